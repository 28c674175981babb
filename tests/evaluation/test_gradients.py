"""Gradients of the log-likelihood, against those of one function of the hidden states behind the last layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from amalgam.calibration.stream import Stream
from amalgam.evaluation.gradients import OUTSIDE, Gradients
from amalgam.kernels.layouts import dense
from amalgam.kernels.packed import PackedWeight
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.registry import all_families
from tests.models.harness import load_model
from tests.models.tiny import save_tiny

IDS, LABEL = list(range(3, 20)), 5


def test_logits_that_are_scaled_and_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite's factors, and Gemma's cap besides."""
    save_tiny(next(family for family in all_families() if family.name == "granite"), tmp_path)
    decoder, version = load_model(tmp_path)
    spec = replace(decoder.spec, logits_softcap=0.3)
    weights = {slot: dense(version[slot].dequantize(torch.float32)) for slot in version.origins}

    def load(layer_id: int) -> dict[str, PackedWeight]:
        prefix = f"layers.{layer_id}."
        inside = layer_id != OUTSIDE
        return {s: w for s, w in weights.items() if (s.startswith(prefix) if inside else not s.startswith("layers."))}

    stream = Stream(spec, [IDS], weights)
    for layer_id in range(spec.num_layers):
        stream.run(layer_id, load(layer_id))
    assert isinstance(spec.norm, RmsNorm)
    end = stream.hidden[0].clone().requires_grad_()
    normed = torch.nn.functional.rms_norm(end, end.shape[1:], weights["norm"].dense, spec.norm.eps)
    logits = 0.3 * torch.tanh(normed @ weights["head"].dense.T / 8.0 / 0.3)
    (slope,) = torch.autograd.grad(logits.log_softmax(-1)[:, LABEL].sum(), end)

    def always(p: Tensor, count: int, **_: object) -> Tensor:
        return torch.full((len(p), count), LABEL)

    monkeypatch.setattr(torch, "multinomial", always)
    _, chunks = next(Gradients(spec, [IDS], load, draws=1).layers())
    found = {seen.slot: seen.gradients[0] for chunk in chunks for seen in chunk}
    torch.testing.assert_close(found["layers.1.mlp.down"], 0.22 * slope, rtol=1e-4, atol=1e-6)
