"""The weights of a smaller model as its checkpoint's tensors: named, fused and turned as the whole model's have them.

In: slots, their values, how the whole model's checkpoint stores them. Out: tensors by name. Must never know: why
something went.

A weight that is a tensor of its own keeps its name, numbered anew. Where several are one tensor (all experts of a
layer, gate and up), they are again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.composition.wide import WideModel
from amalgam.formats.fused import TensorSlice
from amalgam.models.spec import Slot

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Stored:
    """Where a weight of the smaller model goes.

    Attributes:
        name: of the tensor.
        part: how the whole model's weight lies in its tensor; None: it is one of its own.
        index: of the expert, in a tensor of several.
    """

    name: str
    part: TensorSlice | None = None
    index: int | None = None


def stored_as(model: WideModel, slot: Slot, origin: Slot) -> Stored:
    """
    Args:
        slot, origin: of the smaller model, and of the whole one.
    """
    published = model.family.logical_name(slot)
    stored = model.source.weights[model.by_slot[origin.name]]
    if model.source.store.metadata:
        return Stored(published)
    (part,) = stored.parts.values()
    if not isinstance(part, TensorSlice):
        return Stored(_renumbered(part.name, origin, slot) or published)
    name = _renumbered(part.whole.name, origin, slot)
    assert name is not None, part.whole.name
    numbers = _NUMBER.findall(slot.name)
    return Stored(name, part, int(numbers[-1]) if part.index is not None else None)


def _renumbered(name: str, origin: Slot, slot: Slot) -> str | None:
    """A tensor's name with the numbers of another slot; None if its numbers are not the slot's."""
    old, new = _NUMBER.findall(origin.name), iter(_NUMBER.findall(slot.name))
    found = _NUMBER.findall(name)
    if found != old[: len(found)]:
        return None
    return _NUMBER.sub(lambda match: next(new), name)


def tensors_of(weights: Iterable[tuple[Slot, Stored, Tensor]]) -> dict[str, Tensor]:
    """
    Args:
        weights: slot, where it goes, its values `[out, in]`; all that go to one tensor are there.
    """
    tensors: dict[str, Tensor] = {}
    together: dict[str, list[tuple[Stored, Tensor]]] = {}
    for slot, stored, values in weights:
        turned = values.t().contiguous() if slot.is_transposed else values
        if stored.part is None:
            tensors[stored.name] = turned
        else:
            together.setdefault(stored.name, []).append((stored, turned))
    return {**tensors, **{name: _fused(parts) for name, parts in together.items()}}


def _fused(parts: list[tuple[Stored, Tensor]]) -> Tensor:
    first, values = parts[0]
    part = first.part
    assert part is not None
    modules = len({_rows_of(stored) for stored, _ in parts})
    inner = [values.shape[0] * modules, *values.shape[1:]]
    if part.is_transposed:
        inner.reverse()
    experts = [] if first.index is None else [1 + max(stored.index or 0 for stored, _ in parts)]
    whole = torch.empty(*experts, *inner, dtype=values.dtype)
    for stored, each in parts:
        assert stored.part is not None
        place = whole if stored.index is None else whole[stored.index]
        if stored.part.is_transposed:
            place = place.t()
        if stored.part.rows is not None:
            start, _, step = stored.part.rows
            if step == 1:
                before = stored.part.shape[0]  # rows of a module in the whole model
                start = start // before * each.shape[0]
                place = place[start : start + each.shape[0]]
            else:
                place = place[start::step]
        place.copy_(each.view(place.shape))
    return whole


def _rows_of(stored: Stored) -> tuple[int, int, int] | None:
    return None if stored.part is None else stored.part.rows
