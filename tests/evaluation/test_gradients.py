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
from amalgam.kernels.weights import PackedWeight
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.registry import all_families
from tests.models.harness import load_model
from tests.models.tiny import save_tiny

IDS, LABEL = list(range(3, 20)), 5


def always(p: Tensor, count: int, **_: object) -> Tensor:
    return torch.full((len(p), count), LABEL)


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

    monkeypatch.setattr(torch, "multinomial", always)
    _, chunks = next(Gradients(spec, [IDS], load, draws=1).layers())
    found = {seen.slot: seen.gradients[0] for chunk in chunks for seen in chunk}
    torch.testing.assert_close(found["layers.1.mlp.down"], 0.22 * slope, rtol=1e-4, atol=1e-6)


def test_what_expands_keys_and_values_has_the_slope_of_the_likelihood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By differences of the likelihood along a direction of the weight."""
    save_tiny(next(family for family in all_families() if family.name == "deepseek_v3"), tmp_path)
    decoder, version = load_model(tmp_path)
    spec = decoder.spec
    weights = {slot: dense(version[slot].dequantize(torch.float32)) for slot in version.origins}
    last = spec.num_layers - 1
    name = f"layers.{last}.attention.kv_b"
    direction = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))

    def load(layer_id: int, step: float = 0.0) -> dict[str, PackedWeight]:
        prefix = f"layers.{layer_id}."
        inside = layer_id != OUTSIDE
        found = {s: w for s, w in weights.items() if (s.startswith(prefix) if inside else not s.startswith("layers."))}
        return {s: dense(w.dense + step * direction) if s == name else w for s, w in found.items()}

    def likelihood(step: float) -> float:
        stream = Stream(spec, [IDS], load(OUTSIDE))
        for layer_id in range(spec.num_layers):
            stream.run(layer_id, load(layer_id, step))
        assert isinstance(spec.norm, RmsNorm)
        end = stream.hidden[0]
        normed = torch.nn.functional.rms_norm(end, end.shape[1:], weights["norm"].dense, spec.norm.eps)
        logits = (normed @ weights["head"].dense.T).double()
        return float(logits.log_softmax(-1)[:, LABEL].sum())

    monkeypatch.setattr(torch, "multinomial", always)
    _, chunks = next(Gradients(spec, [IDS], load, draws=1).layers())
    (seen,) = [seen for chunk in chunks for seen in chunk if seen.slot == name]
    slope = float((seen.gradients[0] * (seen.inputs @ direction.T)).sum())
    step = 0.01 * float(weights[name].dense.std())
    assert (likelihood(step) - likelihood(-step)) / (2 * step) == pytest.approx(slope, rel=0.02)


def test_layers_attend_to_what_was_chosen_on_the_way_back_too(tmp_path: Path) -> None:
    """Of texts in two chunks, longer than what is chosen; the second layer has no indexer."""
    family = next(family for family in all_families() if family.name == "glm_moe_dsa")
    save_tiny(family, tmp_path, index_topk=12, index_n_heads=16)
    decoder, version = load_model(tmp_path)
    weights = {slot: dense(version[slot].dequantize(torch.float32)) for slot in version.origins}
    texts = [list(range(3, 43)), list(range(90, 120))]

    def load(layer_id: int) -> dict[str, PackedWeight]:
        prefix = f"layers.{layer_id}."
        inside = layer_id != OUTSIDE
        return {s: w for s, w in weights.items() if (s.startswith(prefix) if inside else not s.startswith("layers."))}

    stream = Stream(decoder.spec, texts, weights, chunk_tokens=40)
    shown: dict[str, Tensor] = {}
    for layer_id in range(decoder.spec.num_layers):
        stream.run(
            layer_id, load(layer_id), lambda seen: shown.update(dict.fromkeys(seen.slots, torch.cat(list(seen.chunks))))
        )
    for _, chunks in Gradients(decoder.spec, texts, load, draws=1, chunk_tokens=40).layers():
        found = [seen for chunk in chunks for seen in chunk]
        for part in ("kv_b", "o"):
            seen = [each for each in found if each.slot.endswith(f".attention.{part}")]
            torch.testing.assert_close(torch.cat([one.inputs for one in seen]), shown[seen[0].slot])
            assert all(bool(one.gradients.isfinite().all()) for one in seen)
