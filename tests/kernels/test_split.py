"""Experts of one layer on several devices give what they give on one, bit for bit, and what moves is counted."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from amalgam.base.threads import StoppableThread
from amalgam.kernels.backends import choose_backend
from amalgam.kernels.backends.base import Backend
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.backends.split.experts import SplitExperts, Splitter
from amalgam.kernels.backends.split.worker import Worker
from amalgam.kernels.devices import torch_device
from amalgam.kernels.program import Mix, Program, Rows
from amalgam.kernels.weights import SWIGLU, Expert, ExpertTable, GatedActivation, PackedWeight
from tests.engine.running import wait_until
from tests.errors import raises
from tests.kernels.test_moe import HIDDEN, mixed_experts, random, routing

CPU = torch.device("cpu")
COUNT = 9
PLACES = [(None, "cpu:1", "cpu:2") * 3, ("cpu:1",) * COUNT, (None,) * 8 + ("cpu:1",)]

needs_kernels = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))


def reference(dtype: torch.dtype) -> Backend:
    return ReferenceBackend(dtype, CPU)


BACKENDS = [reference, pytest.param(CpuBackend, marks=needs_kernels)]


def prepared(experts: Sequence[Expert], backend: Backend, activation: str = "int8") -> tuple[Expert, ...]:
    def pack(weight: PackedWeight) -> PackedWeight:
        return backend.prepare(weight, activation, codes=False)  # type: ignore[arg-type]

    return tuple(
        Expert(pack(e.gate), pack(e.up), pack(e.down), *(e.gate_bias, e.up_bias, e.down_bias)) for e in experts
    )


def split(experts: Sequence[Expert], devices: tuple[str | None, ...], splitter: Splitter) -> SplitExperts:
    rows = Rows("x", HIDDEN, 0, HIDDEN)
    program = splitter.split(Program((Mix(rows, ExpertTable(experts, devices), rows),)))
    assert isinstance(program.instructions[0], Mix) and isinstance(program.instructions[0].experts, SplitExperts)
    return program.instructions[0].experts


def alone(
    backend: Backend, experts: Sequence[Expert], x: Tensor, ids: Tensor, weights: Tensor, activation: GatedActivation
) -> Tensor:
    """By the operator that a model on one device runs."""
    return backend.operators.moe(x, ids, weights, backend.prepare_experts(ExpertTable(experts)), activation)  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mixture_is_the_same_bits_wherever_its_experts_lie(
    make: Callable[[torch.dtype], Backend], dtype: torch.dtype
) -> None:
    backend = make(dtype)
    experts = prepared(mixed_experts(COUNT, has_bias=True), backend)
    splitter = Splitter(backend, lambda name: make(dtype))
    for tokens, activation in ((1, SWIGLU), (7, GatedActivation(1.702, 1.0, 7.0)), (30, SWIGLU)):
        x, (ids, weights) = random(tokens, HIDDEN).to(dtype), routing(tokens, COUNT, 3)
        expected = alone(backend, experts, x, ids, weights, activation).nan_to_num(7)  # float16 has little room
        for devices in PLACES:
            result = split(experts, devices, splitter).mix(x, ids, weights, activation)
            assert torch.equal(result.nan_to_num(7), expected), (devices, tokens)


@pytest.mark.parametrize("make", BACKENDS)
def test_a_choice_of_no_expert_adds_nothing_wherever_experts_lie(make: Callable[[torch.dtype], Backend]) -> None:
    backend = make(torch.float32)
    experts = prepared(mixed_experts(COUNT), backend)
    splitter = Splitter(backend, lambda name: make(torch.float32))
    x, (ids, weights) = random(4, HIDDEN), routing(4, COUNT, 3)
    ids[0, 1] = ids[2, 0] = -1
    ids[3] = -1
    expected = alone(backend, experts, x, ids, weights, SWIGLU)
    for devices in PLACES:
        assert torch.equal(split(experts, devices, splitter).mix(x, ids, weights, SWIGLU), expected), devices


def test_what_goes_to_a_device_and_comes_back_is_counted() -> None:
    backend = reference(torch.float32)
    splitter = Splitter(backend, lambda name: reference(torch.float32))
    mixture = split(prepared(mixed_experts(4), backend), (None, "cpu:1", None, "cpu:2"), splitter)
    ids = torch.tensor([[0, 1], [2, 0], [1, 3]])
    mixture.mix(random(3, HIDDEN), ids, torch.ones(3, 2), SWIGLU)
    row, id_bytes = 4 * HIDDEN, 2 * 8
    assert vars(splitter.traffic["cpu:1"]) == {
        "sent_bytes": 2 * (row + id_bytes), "returned_bytes": 2 * row, "num_calls": 1, "num_rows": 2
    }  # fmt: skip
    assert splitter.traffic["cpu:2"].num_rows == 1
    mixture.mix(random(1, HIDDEN), ids[1:2], torch.ones(1, 2), SWIGLU)  # whose experts are all here
    assert splitter.traffic["cpu:1"].num_calls == 1


def test_a_program_on_one_device_stays_as_it_is() -> None:
    rows = Rows("x", HIDDEN, 0, HIDDEN)
    experts = mixed_experts(2)
    for devices in ((), (None, None)):
        program = Program((Mix(rows, ExpertTable(experts, devices), rows),))
        assert Splitter(reference(torch.float32), reference).split(program) is program  # type: ignore[arg-type]


@pytest.mark.parametrize("far_fails", [False, True])
def test_an_error_on_either_side_ends_the_step_once_both_are_done(far_fails: bool) -> None:
    class Failing(ReferenceBackend):
        def expert_outputs(self, *arguments: object, **more: object) -> None:
            raise ArithmeticError("no such luck")

    good, bad = reference(torch.float32), Failing(torch.float32, CPU)
    near, far = (good, bad) if far_fails else (bad, good)
    splitter = Splitter(near, lambda name: far)
    mixture = split(mixed_experts(4), (None, "cpu:1", None, "cpu:1"), splitter)
    x, (ids, weights) = random(5, HIDDEN), routing(5, 4, 2)
    for _ in range(2):  # and the thread goes on
        with pytest.raises(ArithmeticError):
            mixture.mix(x, ids, weights, SWIGLU)
    if not far_fails:
        assert splitter.traffic["cpu:1"].num_calls == 2


def test_a_thread_ends_with_whoever_it_works_for() -> None:
    worker = Worker("amalgam-test-worker")
    seen: list[tuple[str, int, bool]] = []
    with torch.inference_mode():
        worker.submit(
            lambda: seen.append(
                (threading.current_thread().name, torch.get_num_threads(), torch.is_inference_mode_enabled())
            )
        ).result(60)
    assert seen == [("amalgam-test-worker", 1, True)]
    del worker
    gc.collect()
    wait_until(lambda: "amalgam-test-worker" not in {thread.name for thread in threading.enumerate()})


def test_steps_go_on_behind_a_thread_that_was_stopped() -> None:
    """As when the process ends, which stops the latest thread first."""
    worker, seen = Worker("amalgam-stopped-worker"), list[str]()

    def note() -> None:
        seen.append(threading.current_thread().name)

    worker.submit(note).result(60)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "amalgam-stopped-worker"]
    assert isinstance(thread, StoppableThread)
    thread.stop()
    worker.submit(note).result(60)
    assert seen == ["amalgam-stopped-worker", threading.current_thread().name]


@needs_kernels
def test_outputs_of_experts_elsewhere_are_left_alone() -> None:
    backend = CpuBackend(torch.float32)
    table = backend.prepare_experts(ExpertTable(prepared(mixed_experts(3), backend)))
    ids = torch.tensor([[0, -1], [-1, -1], [2, 1]])
    out = torch.full((3, 2, HIDDEN), torch.nan)
    backend.expert_outputs(random(3, HIDDEN), ids, table, SWIGLU, out)
    assert torch.equal(out.isnan().all(-1), ids < 0) and not bool(out[ids >= 0].isnan().any())
    with raises(IndexError, 3):
        backend.expert_outputs(random(3, HIDDEN), ids + 1, table, SWIGLU, out)
    with raises(IndexError, -2):
        backend.expert_outputs(random(3, HIDDEN), ids - 1, table, SWIGLU, out)
    for bad in (out[:2], out[:, :1], out.double(), out.mT):
        with raises(ValueError, "out"):
            backend.expert_outputs(random(3, HIDDEN), ids, table, SWIGLU, bad)
    with raises(ValueError, "gate_weights"):
        backend.weighted_sum(out, ids, torch.ones(3, 1), torch.float32)
    with raises(ValueError, "expert_ids"):
        backend.weighted_sum(out, ids[:, :1], torch.ones(3, 2), torch.float32)


@pytest.mark.parametrize("index", [None, 0, 99])
def test_who_plans_for_a_card_that_is_not_here_is_given_a_backend(
    monkeypatch: pytest.MonkeyPatch, index: int | None
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # as PyTorch is installed on most machines, with a card or not
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    device = torch.device("cuda", index)
    assert choose_backend(torch.bfloat16, device).device == device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card is here")
@pytest.mark.parametrize(("primary", "other"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_processors_and_a_card_together(primary: str, other: str) -> None:
    backends = {name: choose_backend(torch.float32, torch_device(name)) for name in (primary, other)}
    near, far = backends[primary], backends[other]
    devices = (None, other) * 4
    plain = mixed_experts(8)
    experts = [prepared([expert], far if name else near)[0] for expert, name in zip(plain, devices, strict=True)]
    splitter = Splitter(near, backends.__getitem__)
    mixture = split(experts, devices, splitter)
    for tokens in (1, 70):
        x, (ids, weights) = random(tokens, HIDDEN), routing(tokens, 8, 3)
        result = mixture.mix(x.to(near.device), ids.to(near.device), weights.to(near.device), SWIGLU).cpu()
        expected = alone(reference(torch.float32), plain, x, ids, weights, SWIGLU)
        assert torch.allclose(result, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
