"""What a stream computes is what the decoder computes, and what it shows is what the projections read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import rms_norm

from amalgam.calibration.inputs import Inputs
from amalgam.calibration.stream import Stream
from amalgam.errors import CheckpointError
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.registry import all_families
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion
from tests.errors import raises
from tests.models.harness import Runner, like, load_model
from tests.models.tiny import save_tiny

FAMILIES = {family.name: family for family in all_families()}
PROMPTS = [list(range(3, 40)), [7, 7, 9], list(range(100, 150))]


def opened(folder: Path) -> tuple[Runner, ModelSpec, dict[str, PackedWeight]]:
    decoder, version = load_model(folder)
    plain = {slot: dense(version[slot].dequantize(torch.float32)) for slot in version.origins}
    runner = Runner(like(decoder, ReferenceBackend), WeightVersion(1, plain, version.origins, version.keys))
    return runner, decoder.spec, plain


def of_layer(weights: dict[str, PackedWeight], layer_id: int) -> dict[str, PackedWeight]:
    return {slot: weight for slot, weight in weights.items() if slot.startswith(f"layers.{layer_id}.")}


# Of texts with more tokens than are chosen; of few heads many scores would be 0.
CHOOSING = {"index_topk": 12, "index_n_heads": 16}


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in sorted(FAMILIES)), ("deepseek_v32", CHOOSING), ("glm_moe_dsa", CHOOSING)],
)
def test_hidden_states_and_inputs_are_those_of_the_decoder(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(FAMILIES[name], tmp_path, **changes)
    runner, spec, weights = opened(tmp_path)
    stream = Stream(spec, PROMPTS, weights, chunk_tokens=40)
    shown: list[Inputs] = []
    for layer_id in range(spec.num_layers):
        stream.run(layer_id, of_layer(weights, layer_id), shown.append)
    runner.step(dict(enumerate(PROMPTS)))
    normed = runner.decoder.compile(runner.version).hidden()
    hidden = torch.cat(stream.hidden)
    if "norm_bias" in weights:
        expected = torch.nn.functional.layer_norm(
            hidden, hidden.shape[1:], weights["norm"].dense, weights["norm_bias"].dense, spec.norm.eps
        )
    else:
        weight = weights["norm"].dense + float(getattr(spec.norm, "adds_one", False))
        expected = rms_norm(hidden, hidden.shape[1:], weight, spec.norm.eps)
    assert torch.allclose(normed, expected, rtol=2e-3, atol=2e-3)
    named = [slot for inputs in shown for slot in inputs.slots]
    wanted = {slot.name for slot in spec.slots if slot.is_linear and slot.role != "head"}
    assert len(named) == len(set(named)) and set(named) == wanted
    total = sum(map(len, PROMPTS))
    for inputs in shown:
        assert inputs.num_routed is None or inputs.num_routed == inputs.num_tokens
        assert inputs.num_routed is not None or inputs.num_tokens == total
        assert all(part.shape[1] == weights[slot].shape[1] for part in inputs.chunks for slot in inputs.slots)
    for layer_id in spec.moe_layer_ids:
        of_experts = [i for i in shown if i.slots[0].startswith(f"layers.{layer_id}.mlp.experts") and len(i.slots) > 1]
        sent = sum(inputs.num_routed or 0 for inputs in of_experts)
        assert sent == total * spec.layers[layer_id].mlp.num_active_experts


def test_weights_given_in_return_are_used_from_there_on(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    _, spec, weights = opened(tmp_path)
    layer = of_layer(weights, 0)
    halved = {slot: dense(weight.dense / 2) if len(weight.shape) == 2 else weight for slot, weight in layer.items()}
    halved["layers.0.mlp.router"] = layer["layers.0.mlp.router"]
    given, replaced = Stream(spec, PROMPTS, weights), Stream(spec, PROMPTS, weights)
    given.run(0, halved)
    replaced.run(0, layer, lambda inputs: {slot: halved[slot] for slot in inputs.slots})
    assert torch.equal(torch.cat(given.hidden), torch.cat(replaced.hidden))


def test_a_rare_expert_sees_the_tokens_that_came_nearest_and_results_stay(tmp_path: Path) -> None:
    save_tiny(FAMILIES["qwen3_moe"], tmp_path)
    _, spec, weights = opened(tmp_path)
    plain, covered = Stream(spec, PROMPTS, weights), Stream(spec, PROMPTS, weights, min_expert_tokens=60)
    seen: dict[bool, dict[str, Inputs]] = {False: {}, True: {}}
    for key, stream in ((False, plain), (True, covered)):
        stream.run(0, of_layer(weights, 0), lambda inputs, key=key: seen[key].update({inputs.slots[-1]: inputs}))
    assert torch.allclose(torch.cat(plain.hidden), torch.cat(covered.hidden), rtol=1e-4, atol=1e-5)
    experts = [slot for slot in seen[False] if ".experts." in slot]
    assert any((seen[False][slot].num_routed or 0) < 60 for slot in experts)
    for slot in experts:
        few, more = seen[False][slot], seen[True][slot]
        assert few.num_routed == more.num_routed
        assert more.num_tokens == max(60, few.num_tokens)


def test_inputs_that_are_not_finite_are_named(tmp_path: Path) -> None:
    save_tiny(FAMILIES["llama"], tmp_path)
    _, spec, weights = opened(tmp_path)
    layer = of_layer(weights, 0)
    layer["layers.0.attention_norm"] = dense(torch.full_like(layer["layers.0.attention_norm"].dense, torch.nan))

    def look(inputs: Inputs) -> None:
        assert inputs.second_moment.shape

    with raises(CheckpointError, "layers.0.attention.q"):
        Stream(spec, PROMPTS, weights).run(0, layer, look)


def test_the_second_moment_is_the_mean_of_outer_products() -> None:
    chunks = [torch.randn(5, 3), torch.randn(2, 3)]
    together = torch.cat(chunks)
    inputs = Inputs(("a",), chunks)
    assert torch.allclose(inputs.second_moment, torch.einsum("ti,tj->ij", together, together) / 7, atol=1e-6)
    assert torch.allclose(inputs.mean_magnitude, together.abs().mean(0))
    assert inputs.largest == float(together.abs().max())
