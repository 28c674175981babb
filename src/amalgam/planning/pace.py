"""How long a step of a model takes on this machine, measured on a few of its layers.

In: a spec, and what gives the weights of its slots. Out: seconds. Must never know: checkpoints, sources, what fits.

Of each kind of layer one layer is run, and then several: what these add is the time of a layer, the remainder that of
embedding, head and all that a step costs anyway. The model need not fit: weights that would take the same time share a
few copies, so many that caches do not hold them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from amalgam.kernels.weights import PackedWeight
from amalgam.models.decoder import Decoder
from amalgam.models.spec import LayerSpec, ModelSpec, Slot
from amalgam.models.weights import WeightVersion
from amalgam.planning.speed import STEP_POSITIONS, copies_beyond_caches, step_seconds

_LAYER = re.compile(r"^layers\.(\d+)\.")
_LAYERS, _ROUNDS = 3, 2


@dataclass(frozen=True)
class Sample:
    """A weight of a slot.

    Attributes:
        kind: equal for weights that take the same time; None: one of a kind.
        load: makes it.
    """

    kind: Hashable | None
    load: Callable[[], PackedWeight]


def expected_step(
    spec: ModelSpec, sample_of: Callable[[str], Sample], dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds of a step with one token of one sequence behind a short context.

    Args:
        sample_of: the name of a slot → its weight.
    """
    members: dict[LayerSpec, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        members.setdefault(layer, []).append(index)
    shelf = _Shelf(sample_of)
    layers, outside = 0.0, []
    for indices in members.values():
        # Spread over the kind's layers, whose precisions may differ.
        several = [indices[(2 * number + 1) * len(indices) // (2 * _LAYERS)] for number in range(_LAYERS)]
        one, more = (
            min(_seconds(spec, chosen, shelf, dtype, device) for _ in range(_ROUNDS))
            for chosen in (several[:1], several)
        )
        per_layer = max(0.0, more - one) / (_LAYERS - 1)
        layers += len(indices) * per_layer
        outside.append(max(0.0, one - per_layer))
    return layers + min(outside)


def _seconds(spec: ModelSpec, layers: Sequence[int], shelf: _Shelf, dtype: torch.dtype, device: torch.device) -> float:
    source = getattr(spec.layers[layers[0]].attention, "source", None)
    if source is not None:  # what these layers share has to be there
        layers = (source, *layers)
    chosen = (_sharing(spec.layers[index]) for index in layers)
    part = replace(spec, layers=tuple(chosen), num_draft_layers=0)
    weights = {slot.name: shelf.take(slot, layers) for slot in part.slots}
    decoder = Decoder(part, STEP_POSITIONS, dtype, device)
    return step_seconds(decoder, WeightVersion(1, weights, {}, {}))


def _sharing(layer: LayerSpec) -> LayerSpec:
    """A layer whose keys are those of another one, if they are, of the first."""
    attention: Any = layer.attention
    is_sharing = getattr(attention, "source", None) is not None
    return replace(layer, attention=replace(attention, source=0)) if is_sharing else layer


class _Shelf:
    """Weights to run with: each of a kind, and its copies, in turns."""

    def __init__(self, sample_of: Callable[[str], Sample]) -> None:
        self._sample_of = sample_of
        self._copies: dict[Hashable, list[PackedWeight]] = {}
        self._taken: dict[Hashable, int] = {}

    def take(self, slot: Slot, layers: Sequence[int]) -> PackedWeight:
        name = _LAYER.sub(lambda found: f"layers.{layers[int(found[1])]}.", slot.name)
        sample = self._sample_of(name)
        key = name if sample.kind is None else sample.kind
        if key not in self._copies:
            weight = sample.load()
            self._copies[key] = [weight] if sample.kind is None else copies_beyond_caches(weight)
        place = self._taken[key] = self._taken.get(key, -1) + 1
        return self._copies[key][place % len(self._copies[key])]
