"""A whole wide checkpoint, opened to make another one of it: weights by slot, layer by layer.

In: a folder or hub id. Out: `WideModel`. Must never know: what is made of the weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from amalgam.base.counting import counted
from amalgam.composition.opening import CONFIG_NAME
from amalgam.composition.planned import oriented
from amalgam.composition.source import Source
from amalgam.errors import CheckpointError
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from amalgam.models.registry import fused_tensors, read_spec
from amalgam.models.spec import Family, ModelSpec, Slot

_LAYER = re.compile(r"layers\.(\d+)\.")


def layer_of(slot: Slot) -> int | None:
    """The layer that a slot is of; None outside of the layers."""
    found = _LAYER.match(slot.name)
    return None if found is None else int(found[1])


@dataclass(frozen=True, eq=False)
class WideModel:
    """An opened checkpoint whose weights are all bf16, fp16 or fp32.

    Attributes:
        slots: logical name → slot, in order of use.
    """

    source: Source
    family: Family
    spec: ModelSpec
    slots: Mapping[str, Slot]

    @classmethod
    def open(cls, checkpoint: str) -> WideModel:
        """
        Raises:
            CheckpointError: it is damaged, lacks weights, or has quantized ones.
            UnsupportedError: no family serves it.
        """
        source = Source.open("base", checkpoint, fused_tensors)
        if not source.config:
            raise CheckpointError(source.config_place, remedy=f"The model's sizes stand in {CONFIG_NAME}.")
        family, spec = read_spec(source.config, source.config_place)
        slots = {family.logical_name(slot): slot for slot in spec.slots}
        source = replace(source, weights=family.with_whole_names(source.weights, slots))
        missing = [name for name in slots if name not in source.weights]
        if missing:
            raise CheckpointError(
                f"{source.folder} lacks {counted(len(missing), 'weight')}, for instance {missing[0]!r}.",
                remedy="Download it again, with all of its files.",
            )
        narrow = [name for name in slots if not source.weights[name].is_wide]
        if narrow:
            raise CheckpointError(
                f"{source.folder} is quantized already: {counted(len(narrow), 'weight')}, for instance {narrow[0]!r}.",
                remedy="Give the bf16, fp16 or fp32 checkpoint.",
            )
        for name, slot in slots.items():
            expected = slot.shape[::-1] if slot.is_transposed else slot.shape
            if source.weights[name].shape != expected:
                raise CheckpointError(
                    f"Weight {name!r} in {source.folder} has shape {list(source.weights[name].shape)}.",
                    remedy=f"The model's config.json makes it {list(expected)}.",
                )
        return cls(source, family, spec, slots)

    @cached_property
    def by_slot(self) -> Mapping[str, str]:
        """Slot → logical name."""
        return {slot.name: name for name, slot in self.slots.items()}

    @cached_property
    def nbytes(self) -> int:
        """Of the model's own weights, as stored."""
        return sum(self.source.weights[name].nbytes for name in self.slots)

    def load(self, slot_name: str) -> PackedWeight:
        """A weight as the model has it, dense.

        Raises:
            CheckpointError: it holds NaN or infinity, or its file has changed.
        """
        name = self.by_slot[slot_name]
        stored, slot = self.source.weights[name], self.slots[name]
        weight = dense(self.source.load(stored, lambda packed: oriented(packed, stored, slot)).dequantize())
        if not bool(torch.isfinite(weight.dense).all()):
            raise CheckpointError(
                f"Weight {name!r} in {self.source.folder} holds NaN or infinity.",
                remedy="The file is damaged, or was trained so: take another one.",
            )
        return weight

    def layer(self, layer_id: int) -> dict[str, PackedWeight]:
        """A layer's weights by slot. Raises the errors of `load`."""
        return self._loaded(slot.name for slot in self.slots.values() if layer_of(slot) == layer_id)

    def outside(self) -> dict[str, PackedWeight]:
        """The weights that stand in no layer, but for the head. Raises the errors of `load`."""
        return self._loaded(s.name for s in self.slots.values() if layer_of(s) is None and s.role != "head")

    def _loaded(self, names: Iterable[str]) -> dict[str, PackedWeight]:
        return {name: self.load(name) for name in names}

    @property
    def main_dtype(self) -> str:
        """The type that most values have."""
        sizes: Counter[str] = Counter()
        for name in self.slots:
            for part in self.source.weights[name].parts.values():
                sizes[str(part.dtype).removeprefix("torch.")] += part.nbytes
        return sizes.most_common(1)[0][0]
