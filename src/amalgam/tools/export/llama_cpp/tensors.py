"""A plan's weights as GGUF's tensors: which weights share one, what type it gets, its bytes.

In: planned weights, their places. Out: tensors, decided by samples and written by data. Must never know: metadata,
which architecture it is.

All experts of a layer's projection lie in one tensor, so they share a type. Which types hold a weight as it is can be
said for sure only of its data (`amalgam.formats.gguf.carrying`): some weights of each kind are looked at first, and a
tensor that one does not fit into is decided again with all of them, before anything else is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from amalgam.checkpoint.gguf_writer import FLOATS, GgufWriter, type_bytes
from amalgam.composition.planned import PlannedWeight
from amalgam.formats.gguf.blocks import TYPES
from amalgam.formats.gguf.carrying import (
    Truth,
    bits_of,
    choose,
    fallback_of,
    is_possible,
    kinds_of,
    kinds_of_float,
    rows_of,
    truth_in,
)
from amalgam.formats.gguf.placing import Place, Placing
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight

Kinds = dict[str, Truth]
_WIDE_ROLES = {"norm", "bias", "router", "convolution"}
_MOST_SAMPLES = 3
_WIDE: Kinds = {"F32": Truth.EXACT}  # of what is float32 in the file in any case


@dataclass(frozen=True, eq=False)
class Member:
    """A weight, or a part of one, in a tensor."""

    weight: PlannedWeight
    place: Place

    @property
    def name(self) -> str:
        return self.weight.choice.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its part of the tensor."""
        if self.place.shape is not None:
            return self.place.shape
        rows = self.weight.slot.shape[0] if self.place.rows is None else len(self.place.rows)
        return (rows, *self.weight.slot.shape[1:])

    @property
    def is_wide(self) -> bool:
        """Whether the tensor is float32 whatever the weight is."""
        slot = self.weight.slot
        return self.place.is_wide or slot.role in _WIDE_ROLES or len(self.shape) == 1 or slot.name == "positions"

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for weights that are stored alike."""
        stored = self.weight.stored
        parts = tuple(sorted((role, str(part.dtype)) for role, part in stored.parts.items()))
        declared = None if stored.is_wide else repr(stored.declared)
        return (self.weight.format.name, stored.format.name, parts, declared, stored.block, stored.bits, self.shape[-1],
                self.place.is_transposed, self.place.columns is None)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Stack:
    """One tensor: a weight, or those of all experts in order."""

    name: str
    members: Sequence[Member]
    kind: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.members[0]
        return first.shape if first.place.expert is None else (len(self.members), *first.shape)

    @property
    def nbytes(self) -> int:
        return type_bytes(self.shape, self.kind)


class MisfitError(Exception):
    """A weight is not in the type as the samples had it."""


def stacks_of(planned: Sequence[PlannedWeight], placing: Placing) -> list[Stack]:
    """The tensors of a plan, undecided, in order of use.

    Raises:
        UnsupportedError: the architecture has no tensor for a weight.
    """
    members: dict[str, list[Member]] = {}
    for weight in planned:
        for place in placing.of(weight.choice.name, weight.slot.shape):
            members.setdefault(place.tensor, []).append(Member(weight, place))
    return [Stack(name, sorted(group, key=lambda member: member.place.expert or 0)) for name, group in members.items()]


class Decider:
    """Chooses the types.

    Args:
        wish: the type for weights whose values have to be rounded; None: by their width.
        narrowest: of weights that share a tensor the narrowest says its type.
    """

    def __init__(self, stacks: Sequence[Stack], wish: str | None, *, narrowest: bool) -> None:
        self._wish, self._narrowest = wish, narrowest
        by_key: dict[tuple[Any, ...], list[Member]] = {}
        for stack in stacks:
            for member in stack.members:
                if not member.is_wide:
                    by_key.setdefault(member.key, []).append(member)
        self._kinds = {key: _shared(_samples(members)) for key, members in by_key.items()}

    def decided(self, stack: Stack) -> Stack:
        """With the type that the samples tell."""
        return self._with(stack, [self.kinds(member) for member in stack.members])

    def again(self, stack: Stack) -> Stack:
        """With the type that all of its weights tell; reads them."""
        return self._with(stack, [_kinds(member) for member in stack.members])

    def kinds(self, member: Member) -> Kinds:
        """The types that hold a weight without its values being rounded, by the samples."""
        return _WIDE if member.is_wide else self._kinds[member.key]

    def alone(self, member: Member) -> str:
        """The type that a weight would have if it shared its tensor with no other."""
        return self._with(Stack(member.place.tensor, [member]), [self.kinds(member)]).kind

    def _with(self, stack: Stack, kinds: Sequence[Kinds]) -> Stack:
        if stack.members[0].is_wide:
            return replace(stack, kind="F32")
        fallbacks = [
            fallback_of(_width(member), member.shape[-1], self._wish)  # the same for all that are stored alike
            for member in stack.members
        ]
        kind = choose(kinds, fallbacks, narrowest=self._narrowest)
        columns = stack.shape[-1]
        if not all(kind in each for each in kinds) and not is_possible(kind, columns):  # a type that none is rounded to
            kind = "Q8_0" if is_possible("Q8_0", columns) else "F16"
        return replace(stack, kind=kind)


def write_stack(writer: GgufWriter, stack: Stack, decider: Decider, advance: Callable[[Member], None]) -> Stack:
    """Write a tensor; returns it with the type that it got: another one where not all weights are as the samples."""

    def chunks(stack: Stack, *, is_foreseen: bool) -> Iterator[Tensor]:
        for member in stack.members:
            packed = _placed(member)
            if is_foreseen and not member.is_wide:
                expected = truth_in(decider.kinds(member), stack.kind)
                if expected < Truth.VALUES and truth_in(kinds_of(packed), stack.kind) > expected:
                    raise MisfitError(member.name)
            yield _bytes(member, packed, stack.kind)
            advance(member)

    try:
        writer.add(stack.name, stack.shape, stack.kind, chunks(stack, is_foreseen=True))
    except MisfitError:
        stack = decider.again(stack)
        writer.add(stack.name, stack.shape, stack.kind, chunks(stack, is_foreseen=False))
    return stack


def _samples(members: Sequence[Member]) -> list[Member]:
    """Some of them, from the first to the last."""
    count = min(len(members), _MOST_SAMPLES)
    return [members[index * (len(members) - 1) // max(count - 1, 1)] for index in range(count)]


def _shared(members: Sequence[Member]) -> Kinds:
    found = [_kinds(member) for member in members]
    kinds = set.intersection(*(set(each) for each in found))
    return {kind: max(each[kind] for each in found) for kind in kinds}


def _kinds(member: Member) -> Kinds:
    weight = member.weight
    if weight.stored.is_wide and weight.quantize_to is None:  # told by the header
        return kinds_of_float(next(iter(weight.stored.parts.values())).dtype)
    packed = _placed(member)
    return {} if packed.is_floating else kinds_of(packed)  # what had to be expanded is in no type as it was


def _width(member: Member) -> float:
    return member.weight.nbytes * 8 / prod(member.weight.slot.shape)


def _placed(member: Member) -> PackedWeight:
    """The weight, its inputs in the file's order; expanded where its blocks do not survive that."""
    packed, place = member.weight.unprepared(), member.place
    if place.is_transposed:
        assert place.rows is not None and place.heads is not None
        values = _values(packed)[place.rows]
        return dense(values.view(place.heads, -1, values.shape[1]).transpose(1, 2).flatten(0, 1).contiguous())
    if place.columns is not None and (packed.is_floating or _runs(place.columns, 32) is None):
        return dense(_values(packed)[:, place.columns].contiguous())
    return packed


def _values(packed: PackedWeight) -> Tensor:
    return packed.dense if packed.is_floating else packed.dequantize()


def _runs(index: Tensor, length: int) -> Tensor | None:
    """An index of neighbours as one of runs of so many; None if it tears some."""
    if len(index) % length:
        return None
    runs = index.view(-1, length)
    first = runs[:, :1]
    is_whole = torch.equal(runs, first + torch.arange(length)) and not bool((first % length).any())
    return runs[:, 0] // length if is_whole else None


def _bytes(member: Member, packed: PackedWeight, kind: str) -> Tensor:
    """A member's rows in a type."""
    place = member.place
    if member.is_wide:
        values = packed.dequantize(torch.float32)
        if place.change is not None:
            values = place.change(values)
        return values if place.rows is None else values[place.rows]
    is_torn = place.columns is not None and not packed.is_floating
    if is_torn and (kind in FLOATS or _runs(place.columns, TYPES[kind].num_elements) is None):  # type: ignore[arg-type]
        packed, is_torn = dense(packed.dequantize()[:, place.columns].contiguous()), False
    rows = rows_of(packed, kind)
    if is_torn:
        assert place.columns is not None
        runs = _runs(place.columns, TYPES[kind].num_elements)
        rows = rows.view(rows.shape[0], -1, TYPES[kind].num_bytes)[:, runs].flatten(1)
    return rows if place.rows is None or place.is_transposed else rows[place.rows]


def main_kind(stacks: Sequence[Stack]) -> str:
    """The type of most bytes, which a file is called by."""
    sizes: dict[str, int] = {}
    for stack in stacks:
        sizes[stack.kind] = sizes.get(stack.kind, 0) + stack.nbytes
    return max(sizes, key=lambda kind: (sizes[kind], bits_of(kind)))
