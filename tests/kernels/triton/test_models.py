"""Tiny models whose steps run in Triton, interpreted, give what the reference gives; replayed steps the same bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends import Compiled, Tables
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.program import Program
from amalgam.models.decoder import Decoder
from amalgam.models.registry import all_families
from amalgam.models.weights import WeightVersion
from tests.models.harness import Runner, like, load_model
from tests.models.tiny import save_tiny

pytest.importorskip("triton")

from amalgam.kernels.backends.triton.graphs import CapturedProgram, Recordings
from amalgam.kernels.backends.triton.steps import why_not_recorded
from tests.kernels.triton.backend import Repeater, StepBackend

FAMILIES = {family.name: family for family in all_families()}
# Of the logits' spread: float32 sums in another order, through two layers.
BOUND = 2e-5


class Observer:
    """Keeps all routing."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.seen.append((expert_ids.clone(), gate_weights.clone()))

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.seen += zip(expert_ids, gate_weights, strict=True)


class Recorded(StepBackend):
    """Replays what can be."""

    def __init__(self, dtype: torch.dtype, device: torch.device, repeater: Repeater) -> None:
        super().__init__(dtype, device)
        self.repeater = repeater

    def compile(self, program: Program, tables: Tables) -> Compiled:
        assert why_not_recorded(program, self._dtype) is None
        compiled = super().compile(program, tables)
        recordings = Recordings(super().compile(program, tables), self.repeater, max_positions=64, sizes=(1, 4))
        return CapturedProgram(compiled, recordings)


def run(decoder: Decoder, version: WeightVersion) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Logits and routing of a prompt, its second chunk beside another one, and steps of one to three rows."""
    observer = Observer()
    runner = Runner(decoder, version, num_sequences=3, blocks_each=8, observer=observer)  # type: ignore[arg-type]
    prompt = torch.randint(3, 256, (20,), generator=torch.Generator().manual_seed(2)).tolist()
    logits: list[Tensor] = []
    for chunks in (
        {0: prompt[:9]},
        {0: prompt[9:11], 2: prompt[11:]},
        {0: [5], 2: [9, 8]},
        {2: [7]},
        {2: [6], 1: [4]},
    ):
        logits += runner.step(chunks).values()
    return logits, observer.seen


def assert_close(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=BOUND * float(other.std()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3_moe", {"num_hidden_layers": 1}),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2, "num_hidden_layers": 1, "first_k_dense_replace": 0}),
        ("gpt_oss", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
    ],
)
def test_models(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    save_tiny(FAMILIES[family], tmp_path, **changes)
    decoder, version = load_model(tmp_path)
    results, routing = run(like(decoder, StepBackend), version)
    expected, expected_routing = run(like(decoder, ReferenceBackend), version)
    assert_close(results, expected)
    for (ids, weights), (expected_ids, expected_weights) in zip(routing, expected_routing, strict=True):
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)

    repeater = Repeater()
    replayed, replayed_routing = run(like(decoder, recorded(repeater)), version)
    assert len(repeater.recordings) == 2  # one row, and four
    for one, other in zip(replayed, results, strict=True):
        assert torch.equal(one, other)
    for seen, other in zip(replayed_routing, routing, strict=True):
        assert all(map(torch.equal, seen, other))


def recorded(repeater: Repeater) -> Callable[[torch.dtype, torch.device], Recorded]:
    return lambda dtype, device: Recorded(dtype, device, repeater)
