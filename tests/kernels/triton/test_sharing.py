"""Programs that differ in where their experts lie run what was recorded once; what goes with a version."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends import Compiled
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.backends.split.experts import Splitter
from amalgam.kernels.program import Embed, Head, Mix, Program, Route, Rows
from amalgam.kernels.step import LayerCache, StepContext, StepSequence
from amalgam.kernels.weights import ExpertTable
from amalgam.models.kv_cache import KVCache
from tests.kernels.weights import dense

pytest.importorskip("triton")

from amalgam.kernels.backends.triton.backend import TritonBackend
from tests.kernels.triton.backend import CPU, Repeater
from tests.kernels.triton.test_experts import HIDDEN, experts_of, read
from tests.kernels.triton.weights import ready

X, OUT = Rows("x", HIDDEN, 0, HIDDEN), Rows("out", HIDDEN, 0, HIDDEN)
EMBEDDING, HEAD = (ready(dense((9, HIDDEN), torch.bfloat16, seed)) for seed in (1, 2))
ROUTERS = [ready(dense((3, HIDDEN), torch.bfloat16, seed)) for seed in (3, 4)]
BEFORE, AFTER = ("int4", "bf16", "fp8"), ("bf16", "int4", "int4")


def program_of(experts: ExpertTable, router: int = 0) -> Program:
    """A layer that is nothing but a mixture."""
    route = Route(X, ROUTERS[router], 0, 2, normalises=True)
    return Program((Embed(EMBEDDING, X), route, Mix(X, experts, OUT), Head(OUT, HEAD, None)))


def logits_of(compiled: Compiled, cache: KVCache) -> Tensor:
    """Of a sequence's first token."""
    with torch.inference_mode():
        return compiled.run(StepContext([StepSequence([5], 0, [0], 1)], cache)).clone()


def new_cache() -> KVCache:
    return KVCache([LayerCache(torch.zeros(8, 1, 1), torch.zeros(8, 1, 1))], 2)


def experts(names: Sequence[str]) -> ExpertTable:
    return read(experts_of(names))


def test_versions_share_what_is_recorded_and_it_keeps_no_experts() -> None:
    repeater, cache = Repeater(), new_cache()
    backend, plain = TritonBackend(torch.bfloat16, CPU, repeater, sizes=(1,)), TritonBackend(torch.bfloat16, CPU)
    tables = [experts(BEFORE), experts(AFTER)]
    first, second = (backend.compile(program_of(table), []) for table in tables)
    one, other = (logits_of(plain.compile(program_of(table), []), cache) for table in tables)
    assert not torch.equal(one, other)
    for compiled, expected in ((first, one), (second, other)):
        assert torch.equal(logits_of(compiled, cache), expected)
    assert len(repeater.recordings) == 1
    assert first.describe()["steps"].startswith("CUDA graphs")

    left = [weakref.ref(part) for expert in tables[0].experts for part in expert.gate.parts.values()]
    del first, compiled, tables
    gc.collect()
    assert left and all(part() is None for part in left)
    assert torch.equal(logits_of(second, cache), other)
    assert len(repeater.recordings) == 1


def test_what_is_recorded_for_itself() -> None:
    """Another weight outside of the experts, and a format that the layer has not had."""
    repeater, cache = Repeater(), new_cache()
    backend = TritonBackend(torch.bfloat16, CPU, repeater, sizes=(1,))
    table = experts(("int4", "bf16", "int4"))
    programs = [program_of(table), program_of(table, router=1), program_of(experts(("int4", "bf16", "fp8")))]
    versions = [backend.compile(program, []) for program in programs]
    for number, version in enumerate(versions, 1):
        logits_of(version, cache)
        assert len(repeater.recordings) == number


class Noting(TritonBackend):
    """Keeps of how many rows its experts have been asked."""

    def expert_outputs(self, x: Tensor, *arguments: Any, **more: Any) -> None:
        self.rows = [*getattr(self, "rows", ()), len(x)]
        super().expert_outputs(x, *arguments, **more)


def test_experts_on_two_devices() -> None:
    """The other one computes by the reference: Triton's interpreter runs one kernel at a time in a process."""
    cache, table = new_cache(), experts(BEFORE)
    backend, reference = Noting(torch.float32, CPU, Repeater()), ReferenceBackend(torch.float32, CPU)
    splitter = Splitter(backend, lambda name: reference)
    program = program_of(replace(table, devices=(None, "cpu:1", "cpu:1")))
    angles = torch.zeros(16, 1)  # of so many positions
    split = backend.compile(splitter.split(program), [(angles, angles)])
    split.warm_up(cache)  # the other device is not asked
    assert backend.rows == [1, 16] and splitter.traffic["cpu:1"].num_calls == 0
    whole = logits_of(reference.compile(program_of(table), []), cache)
    torch.testing.assert_close(logits_of(split, cache), whole, rtol=1e-5, atol=1e-5 * float(whole.std()))
    assert splitter.traffic["cpu:1"].num_rows > 0
    said = split.describe()
    assert "2 of 3 experts on cpu:1" in said["mix"] and said["steps"].startswith("not recorded")
