"""AWQ's factors (Lin et al. 2024, section 3.2), where they can move into the weight before: no norm is touched.

    down (silu(gate x) × up x)      up's rows / s, down's columns × s
    o (softmax(…) v x)              v's rows / s, o's columns × s; heads that share a value share s

s is (mean |input|)^α of each input, α by search for the least output error after rounding. Dividing a row of `up` or
`v` changes nothing about its rounding, since groups lie within rows. Norms, which projections of several experts and
sources share, stay as they are; so do all weights whose outputs pass through anything but a product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from amalgam.calibration.inputs import Inputs
from amalgam.calibration.stream import Stream
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import SWIGLU, PackedWeight
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.spec import LayerSpec

_STEPS = 12

# Name and values of a weight → its values after rounding.
RoundTrip = Callable[[str, Tensor], Tensor]


def folded(
    layer: LayerSpec,
    layer_id: int,
    weights: Mapping[str, PackedWeight],
    stream: Stream,
    round_trip: RoundTrip,
) -> dict[str, PackedWeight]:
    """A layer's weights with the best factors moved between them, those in float32; the stream stays where it is."""
    changed = dict(weights)
    before = _pairs(layer, f"layers.{layer_id}", weights)

    def see(inputs: Inputs) -> None:
        for slot in inputs.slots:
            if slot not in before or not inputs.num_tokens:
                continue
            source = changed[before[slot]].dequantize(torch.float32)
            weight = weights[slot].dequantize(torch.float32)
            factors = _best_factors(slot, weight, len(source), inputs, layer, round_trip)
            changed[slot] = dense(weight * _widened(factors, weight.shape[1], layer))
            changed[before[slot]] = dense(source / factors.unsqueeze(1))

    stream.run(layer_id, weights, see, advances=False)
    return changed


def _pairs(layer: LayerSpec, prefix: str, weights: Mapping[str, PackedWeight]) -> dict[str, str]:
    """Weight → the weight before it whose rows are its inputs, but for factors."""
    found = {}
    if type(layer.attention) is Attention:  # others may change values on the way
        found[f"{prefix}.attention.o"] = f"{prefix}.attention.v"
    is_gated = type(layer.mlp) is DenseMlp or (type(layer.mlp) is SparseMoe and layer.mlp.activation == SWIGLU)
    if is_gated:
        downs = [slot for slot in weights if slot.startswith(f"{prefix}.mlp.") and slot.rpartition(".")[2] == "down"]
        found |= {slot: f"{slot.rpartition('.')[0]}.up" for slot in downs}
    return {slot: before for slot, before in found.items() if f"{before}_bias" not in weights}


def _best_factors(
    slot: str, weight: Tensor, width: int, inputs: Inputs, layer: LayerSpec, round_trip: RoundTrip
) -> Tensor:
    """The factors of the weight before, `[width]`."""
    moment = inputs.second_moment
    magnitude = _narrowed(inputs.mean_magnitude, width, layer).clamp(min=1e-8)
    size_of_weight = _narrowed(weight.abs().mean(0), width, layer).clamp(min=1e-8)
    least, best = torch.inf, torch.ones(width)
    for step in range(_STEPS):
        share = step / _STEPS
        # The second kind takes from inputs whose weights are large what it gives to large inputs.
        for factors in (magnitude**share, magnitude**share / size_of_weight ** (1 - share)):
            factors = (factors / (factors.amax() * factors.amin()).sqrt()).clamp(1e-4, 1e4)
            wide = _widened(factors, weight.shape[1], layer)
            error = round_trip(slot, weight * wide) / wide - weight
            size = float(((error @ moment) * error).sum())
            if size < least:
                least, best = size, factors
    return best


def _narrowed(per_input: Tensor, width: int, layer: LayerSpec) -> Tensor:
    """Numbers of a weight's inputs → of the rows before it: the mean over the heads that share a value."""
    if len(per_input) == width:
        return per_input
    assert isinstance(layer.attention, Attention)
    heads = per_input.view(layer.attention.num_kv_heads, -1, layer.attention.head_dim)
    return heads.mean(1).flatten()


def _widened(per_row: Tensor, count: int, layer: LayerSpec) -> Tensor:
    """Numbers of the rows before a weight → of its inputs."""
    if len(per_row) == count:
        return per_row
    assert isinstance(layer.attention, Attention)
    heads = per_row.view(layer.attention.num_kv_heads, 1, layer.attention.head_dim)
    return heads.expand(-1, count // len(per_row), -1).flatten()
