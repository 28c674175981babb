"""Whether a source is a checkpoint of the model at all: its config, and what it holds beside the model's weights.

In: the base checkpoint's model, an opened source. Out: nothing, or the error. Must never know: rules, which weights are
taken from the source.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from amalgam.base.counting import counted
from amalgam.composition.source import Source
from amalgam.composition.tied_head import check_tied_head
from amalgam.config.placement import BASE_SOURCE
from amalgam.errors import CheckpointError, describe
from amalgam.models.registry import read_spec
from amalgam.models.spec import Family, ModelSpec, Slot

HEAD = "lm_head.weight"  # of every family


class SourceCheck:
    """Checks sources against the base checkpoint's model; what was read of one is not read again."""

    def __init__(
        self, family: Family, spec: ModelSpec, slots: Mapping[str, Slot], base_place: str, max_seq_length: int
    ) -> None:
        """
        Args:
            slots: by logical name.
            base_place: where the base's config stands, for messages.
        """
        self._family = family
        self._spec = spec
        self._slots = slots
        self._base_place = base_place
        self._max_seq_length = max_seq_length
        self._zeros: set[tuple[str, str]] = set()  # (source, bias) that were read and are zeros

    def check(self, source: Source) -> None:
        """
        Raises:
            CheckpointError: it is of another model, or holds weights that the model has no place for.
        """
        spec = self._spec
        if source.config and source.name != BASE_SOURCE:
            _, spec = read_spec(source.config, source.config_place)
            if source.store.metadata:  # GGUF has no word for a tied head: it leaves the head out, or writes it twice
                spec = replace(spec, has_tied_head=self._spec.has_tied_head)
            self._check_same_model(source, spec)
        tied = {HEAD} if self._spec.has_tied_head else set()
        if tied:  # a GGUF file does not declare it, and may hold both in other precisions
            embedding = self._family.logical_name(self._spec.slots[0])
            check_tied_head(source, embedding, HEAD, may_be_rounded=bool(source.store.metadata))
        known = {*self._slots, *tied}
        surplus = [
            name
            for name, weight in source.weights.items()
            if name not in known and is_surplus_bias(name, weight.shape, self._slots)
        ]
        check_leftovers(source, self._family, spec, known.union(surplus))
        self._check_zeros(source, surplus)

    def _check_same_model(self, source: Source, spec: ModelSpec) -> None:
        """Raise CheckpointError unless a source's configuration computes what the base's does, by whatever names."""
        positions = min(self._max_seq_length, self._spec.max_positions)
        # Some architectures of GGUF have no word for windows: the base checkpoint's are used in any case.
        has_windows = not source.store.metadata or any(_window(layer.attention) for layer in spec.layers)
        theirs, ours = (_comparable(one, positions, has_windows=has_windows) for one in (spec, self._spec))
        if theirs != ours:
            raise CheckpointError(
                f"{source.config_place} describes another model than {self._base_place}: {_difference(theirs, ours)}.",
                remedy=f"Source {source.name!r} must be a checkpoint of the same model.",
            )

    def _check_zeros(self, source: Source, biases: Sequence[str]) -> None:
        """Raise CheckpointError if biases that the model has no place for are not all zeros; each is read once."""
        for name in biases:
            if (source.name, name) in self._zeros:
                continue
            values = source.values(name)
            assert values is not None
            if bool((values != 0).any()):
                raise CheckpointError(
                    f"{source.folder} holds {name!r}, which is not all zeros, and family {self._family.name!r} has no "
                    "bias there by its config.json.",
                    remedy="If the model has biases, its config.json has to say so (attention_bias, mlp_bias); if a "
                    "tool has made them to correct its errors, quantize without that.",
                )
            self._zeros.add((source.name, name))


def is_surplus_bias(name: str, shape: tuple[int, ...] | None, slots: Mapping[str, Slot]) -> bool:
    """Whether a leftover is the bias of a projection that has none in the model; GPTQ's tools store zeros there."""
    slot = slots.get(f"{name.removesuffix('.bias')}.weight") if name.endswith(".bias") else None
    return slot is not None and (slot.is_linear or slot.decides) and shape in (None, slot.shape[:1])


def check_leftovers(source: Source, family: Family, spec: ModelSpec, known: Container[str]) -> None:
    """Raise CheckpointError if a source holds weights that are neither `known` nor the family's to be left over."""
    leftovers = [name for name in source.weights if name not in known and not family.is_ignored(name, spec)]
    if not leftovers:
        return
    layers = {int(layer[1]) for name in leftovers if (layer := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    remedy = "Is config.json of the same model?"
    if layers and min(layers) == spec.num_layers and all(".layers." in name for name in leftovers):
        first, last = min(layers), max(layers)
        which = f"layer {first} predicts" if first == last else f"layers {first} to {last} predict"
        remedy = (
            f"If {which} further tokens, config.json has to say so: "
            f"num_nextn_predict_layers {last - spec.num_layers + 1}. Otherwise: is it of the same model?"
        )
    raise CheckpointError(
        f"{source.folder} holds {counted(len(leftovers), 'weight')} that family {family.name!r} has no place for: "
        f"{', '.join(leftovers[:5])}{' …' if len(leftovers) > 5 else ''}.",
        remedy=remedy,
    )


def difference(one: ModelSpec, other: ModelSpec) -> str | None:
    """The first thing that two specs compute otherwise, with both values; None if there is none."""
    positions = max(one.max_positions, other.max_positions)
    first, second = (_comparable(spec, positions, has_windows=True) for spec in (one, other))
    return None if first == second else _difference(first, second)


def _comparable(spec: ModelSpec, positions: int, *, has_windows: bool) -> ModelSpec:
    """What two checkpoints of one model must agree in: what is computed for sequences of so many positions."""

    def without_idle_window(attention: Any) -> Any:
        window = _window(attention)
        is_idle = window is not None and (window >= positions or not has_windows)
        return replace(attention, window=None) if is_idle else attention

    layers = tuple(replace(layer, attention=without_idle_window(layer.attention)) for layer in spec.layers)
    return replace(spec, family="", max_positions=0, num_draft_layers=0, layers=layers)


def _window(attention: object) -> int | None:
    return getattr(attention, "window", None)


def _difference(one: object, other: object, where: str = "") -> str:
    """The first field in which two specs differ, with both values."""
    if is_dataclass(one) and type(one) is type(other):
        for field in fields(one):
            pair = getattr(one, field.name), getattr(other, field.name)
            if pair[0] != pair[1]:
                return _difference(*pair, f"{where}.{field.name}" if where else field.name)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        index = next(index for index, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return _difference(one[index], other[index], f"{where}[{index}]")
    if isinstance(one, tuple) and isinstance(other, tuple) and any(map(is_dataclass, one)):
        return f"it has {len(one)} {where} and not {len(other)}"  # what one of them is would fill pages
    return f"{where} is {describe(one)} and not {describe(other)}"
