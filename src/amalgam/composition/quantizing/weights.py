"""Weights → their tensors in the published layout: alone by rounding or search, a layer's together by calibration.

In: wide weights by slot. Out: `Quantized`. Must never know: files, names of checkpoints.

Calibrated, a layer's projections are quantized while the texts run through it: each when it is about to read its
inputs, so that one projection's inputs are in memory at a time. What later projections read has then passed through the
quantized ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from amalgam.calibration.inputs import Inputs
from amalgam.calibration.stream import Stream
from amalgam.composition.quantizing.folding import folded
from amalgam.composition.quantizing.recipe import Recipe
from amalgam.errors import ConfigError
from amalgam.formats.contract import Scheme, WritableFormat
from amalgam.formats.grid import Codes, Encoded, Grid
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import ModelSpec
from amalgam.quantizers.contract import Quantizer
from amalgam.quantizers.gptq import Gptq
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.quantizers.search import ClipSearch


@dataclass(frozen=True)
class Quantized:
    """One weight as it is to be written.

    Attributes:
        tensors: by suffix.
        squared_error: of all values together.
        squared_norm: of all values before, and behind AWQ's factors.
    """

    scheme: Scheme
    tensors: Mapping[str, Tensor]
    squared_error: float
    squared_norm: float

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass
class LayerResult:
    """A layer's linear weights by slot; `expert_tokens` and `rounded`: see `QuantizeReport`."""

    weights: dict[str, Quantized] = field(default_factory=dict)
    expert_tokens: dict[str, tuple[int, int]] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)


class WeightQuantizer:
    """Quantizes as a recipe says."""

    def __init__(self, recipe: Recipe, weight_format: WritableFormat) -> None:
        self._recipe = recipe
        self._format = weight_format

    def alone(self, name: str, weight: Tensor) -> Quantized:
        """One weight without its inputs; `name` is for messages.

        Raises:
            ConfigError: the format cannot hold its shape.
        """
        quantizer: Quantizer = round_to_nearest if self._recipe.method == "round" else ClipSearch()
        grid, wide = self._grid(name, weight, weight.dtype), weight.float()
        return self._finish(wide, quantizer(wide, grid))

    def layer(
        self,
        spec: ModelSpec,
        layer_id: int,
        weights: Mapping[str, PackedWeight],
        stream: Stream,
        on_done: Callable[[str], None],
    ) -> LayerResult:
        """All linear weights of a layer with their inputs; the stream goes on behind the layer.

        Args:
            on_done: is told each slot whose weight is done.

        Raises:
            ConfigError: see `alone`.
            CheckpointError: inputs that are not finite.
        """
        dtypes = {slot: weight.dense.dtype for slot, weight in weights.items()}

        def grid_of(slot: str, weight: Tensor) -> Grid:
            return self._grid(slot, weight, dtypes[slot])

        if self._recipe.method == "awq":
            layer = spec.layers[layer_id]
            round_trip = lambda slot, weight: round_to_nearest(weight, grid_of(slot, weight)).dequantize()  # noqa: E731
            weights = folded(layer, layer_id, weights, stream, round_trip)
        result = LayerResult()
        largest: dict[str, float] = {}

        def see(inputs: Inputs) -> Mapping[str, PackedWeight]:
            wide = {slot: weights[slot].dequantize(torch.float32) for slot in inputs.slots}
            if inputs.num_routed is not None:
                expert = inputs.slots[0].rpartition(".")[0]
                result.expert_tokens[expert] = (inputs.num_routed, inputs.num_tokens)
            pairs = [(weight, grid_of(slot, weight)) for slot, weight in wide.items()]
            if inputs.num_tokens:
                codes = self._with_inputs(pairs, inputs)
                largest.update(dict.fromkeys(inputs.slots, inputs.largest))
            else:
                codes = [round_to_nearest(weight, grid) for weight, grid in pairs]
                result.rounded += inputs.slots
            replaced = {}

            for (slot, weight), found in zip(wide.items(), codes, strict=True):
                result.weights[slot] = self._finish(weight, found)
                replaced[slot] = dense(found.dequantize())
                on_done(slot)
            return replaced

        stream.run(layer_id, weights, see)
        if self._recipe.activations == "static":
            for slot, quantized in result.weights.items():
                scale = _input_scale(slot, largest, self._format)
                result.weights[slot] = replace(quantized, tensors={**quantized.tensors, "input_scale": scale})
        return result

    def restored(self, name: str, weight: Tensor, tensors: Mapping[str, Tensor]) -> PackedWeight:
        """What `layer` has gone on with, from the tensors that were written for a weight."""
        grid = self._grid(name, weight, weight.dtype)
        return dense(self._format.pack(Encoded(grid, tensors)).dequantize())

    def _with_inputs(self, pairs: list[tuple[Tensor, Grid]], inputs: Inputs) -> list[Codes]:
        if self._recipe.method == "round":
            return [round_to_nearest(weight, grid) for weight, grid in pairs]
        search = ClipSearch(inputs.second_moment)
        if self._recipe.method == "gptq":
            gptq = Gptq(inputs.second_moment, search, self._recipe.damping, self._recipe.is_ordered)
            return gptq.together(pairs)
        return [search(weight, grid) for weight, grid in pairs]

    def _grid(self, name: str, weight: Tensor, dtype: torch.dtype) -> Grid:
        """The grid of a weight that was published in `dtype`."""
        rows, columns = weight.shape
        try:
            return self._format.grid((rows, columns), dtype, self._recipe.options)
        except ConfigError as error:
            raise ConfigError(f"Weight {name!r}: {error.what}", remedy=error.remedy) from None

    def _finish(self, wide: Tensor, codes: Codes) -> Quantized:
        encoded = self._format.encode(codes)
        error = float(torch.linalg.vector_norm(codes.dequantize().sub_(wide))) ** 2
        norm = float(torch.linalg.vector_norm(wide)) ** 2
        return Quantized(self._format.scheme(codes.grid), encoded.tensors, error, norm)


def _input_scale(slot: str, largest: Mapping[str, float], weight_format: WritableFormat) -> Tensor:
    """The constant scale of a projection's inputs; of an expert that no token reached, the largest of the others'."""
    found = largest.get(slot)
    if found is None:
        block, _, part = slot.rpartition(".")
        pattern = block.rpartition(".")[0]
        others = (size for other, size in largest.items() if other.startswith(pattern) and other.endswith(f".{part}"))
        found = max(others, default=0.0)
    grid = weight_format.grid((1, 1), torch.float32)
    return torch.tensor([found / grid.reach or torch.finfo(torch.float32).eps])
