"""Tiny models whose steps run in Triton, interpreted, and are replayed where they can be, against the reference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.models.decoder import Decoder
from amalgam.models.weights import WeightVersion
from tests.models.harness import Runner, like, load_model

pytest.importorskip("triton")

from amalgam.kernels.backends.triton.backend import TritonBackend
from tests.kernels.triton.backend import Repeater, loading, save_random

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


def run(decoder: Decoder, version: WeightVersion) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Logits and routing of a prompt, its rest beside another sequence, and a step of one row."""
    observer = Observer()
    runner = Runner(decoder, version, num_sequences=3, blocks_each=8, observer=observer)  # type: ignore[arg-type]
    prompt = torch.randint(3, 64, (11,), generator=torch.Generator().manual_seed(2)).tolist()
    logits: list[Tensor] = []
    for chunks in ({0: prompt[:9]}, {0: prompt[9:10], 2: prompt[10:]}, {2: [7]}):
        logits += runner.step(chunks).values()
    return logits, observer.seen


def assert_close(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(results, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=BOUND * float(other.std()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 0}),
        ("gpt_oss", {"layer_types": ["sliding_attention"]}),
    ],
)
def test_models(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    save_random(family, tmp_path, vocab_size=64, **changes)
    with loading():
        decoder, version = load_model(tmp_path)
    repeater = Repeater()
    recorded = like(decoder, lambda dtype, device: TritonBackend(dtype, device, repeater, sizes=(2,)))
    results, routing = run(recorded, version)
    assert len(repeater.recordings) == 1
    expected, expected_routing = run(like(decoder, ReferenceBackend), version)
    assert_close(results, expected)
    for (ids, weights), (expected_ids, expected_weights) in zip(routing, expected_routing, strict=True):
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-6)
