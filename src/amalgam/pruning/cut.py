"""What remains of a model, and its weights: one model's slots and values in, the smaller one's out.

In: a spec and a `Cut`. Out: shapes and values of the slots that remain. Must never know: why something goes, files.

Layers and experts are numbered anew, in their order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from amalgam.errors import UnsupportedError
from amalgam.models.spec import ModelSpec, Slot
from amalgam.pruning.merging import merged

# Slot → its values, `[out, in]`.
Load = Callable[[str], Tensor]
_LAYER = re.compile(r"layers\.(\d+)\.")
_EXPERT = re.compile(r"(layers\.(\d+)\.mlp\.experts\.)(\d+)(\..*)")
_GATED = re.compile(r"(layers\.\d+\.mlp\.(?:experts\.\d+\.|shared\.)?)(gate|up|down|gate_up)((?:_bias)?)")
PARTS = ("gate", "up", "down")


@dataclass(frozen=True)
class Cut:
    """What remains.

    Attributes:
        layers: that remain, in order.
        experts: layer → for each expert that remains, those that it is made of: the one whose place at the router it
            keeps, and those that are merged into it. Layers that are not named keep all of theirs.
        weights: layer → how much each of its experts counts in a merge.
        channels: MLP (`layers.3.mlp.experts.5.`) → its channels that remain, int64, in order. All or none are named.
    """

    layers: tuple[int, ...]
    experts: Mapping[int, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    weights: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    channels: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def nothing(cls, spec: ModelSpec) -> Cut:
        """All remains."""
        return cls(tuple(range(spec.num_layers)))

    def origin(self, slot_name: str) -> str:
        """The slot of the whole model that a slot of the smaller one comes from."""
        found = _LAYER.match(slot_name)
        if found is None:
            return slot_name
        layer_id = self.layers[int(found[1])]
        name = f"layers.{layer_id}.{slot_name[found.end() :]}"
        expert = _EXPERT.fullmatch(name)
        if expert is None or layer_id not in self.experts:
            return name
        return f"{expert[1]}{self.experts[layer_id][int(expert[3])][0]}{expert[4]}"

    def is_same(self, slot: Slot, origin: Slot) -> bool:
        """Whether a slot has its origin's values."""
        return slot.shape == origin.shape and len(self._group(origin.name)) == 1

    def check(self, slot: Slot, origin: Slot) -> None:
        """
        Raises:
            UnsupportedError: the smaller model has a weight in a shape that this cut does not make.
        """
        rows, columns = self._channels(origin)
        shape = list(origin.shape)
        if rows is not None:
            shape[0] = len(rows)
        if columns is not None:
            shape[1] = len(columns)
        layer = _LAYER.match(origin.name)
        groups = self.experts.get(int(layer[1])) if layer is not None else None
        if groups is not None and tuple(shape) != slot.shape and origin.role == "router":
            shape[_experts_at(slot, origin)] = len(groups)
        if tuple(shape) != slot.shape:
            raise UnsupportedError(
                f"{slot.name} would have shape {shape}, and its config.json would make it {list(slot.shape)}.",
                remedy="This family's configuration cannot say this cut: leave out less, or something else.",
            )

    def values(self, slot: Slot, origin: Slot, load: Load) -> Tensor:
        """A weight of the smaller model.

        Args:
            load: of the whole model's weights.
        """
        group = self._group(origin.name)
        if len(group) > 1:
            return self._merged(origin.name, group, load)
        weight = load(origin.name)
        if slot.shape == origin.shape:
            return weight
        rows, columns = self._channels(origin)
        if rows is not None:
            return weight[rows].contiguous()
        if columns is not None:
            return weight[:, columns].contiguous()
        layer = _LAYER.match(origin.name)
        assert layer is not None and origin.role == "router"
        firsts = torch.tensor([first for first, *_ in self.experts[int(layer[1])]])
        return weight.index_select(_experts_at(slot, origin), firsts)

    def _group(self, origin: str) -> tuple[int, ...]:
        """The experts that one is made of; one number for anything else."""
        expert = _EXPERT.fullmatch(origin)
        groups = self.experts.get(int(expert[2])) if expert is not None else None
        if expert is None or groups is None:
            return (0,)
        return next(group for group in groups if group[0] == int(expert[3]))

    def _merged(self, origin: str, group: tuple[int, ...], load: Load) -> Tensor:
        expert = _EXPERT.fullmatch(origin)
        assert expert is not None
        weights = self.weights.get(int(expert[2]))
        shares = [1.0 if weights is None else weights[expert_id] for expert_id in group]

        def part(expert_id: int, name: str) -> Tensor:
            return load(f"{expert[1]}{expert_id}.{name}")

        return merged(group, shares, part, expert[4].removeprefix("."))

    def _channels(self, origin: Slot) -> tuple[Tensor | None, Tensor | None]:
        """The rows and the columns of a weight that remain; None: all."""
        found = _GATED.fullmatch(origin.name)
        kept = self.channels.get(found[1]) if found is not None else None
        if found is None or kept is None:
            return None, None
        if found[2] == "down":
            return (None, None) if found[3] else (None, kept)
        if found[2] == "gate_up":
            return torch.cat((kept, kept + origin.shape[0] // 2)), None
        return kept, None


def _experts_at(slot: Slot, origin: Slot) -> int:
    """Which dimension of a router's weight has the experts: most have them in rows, a correction may in columns."""
    pairs = zip(slot.shape, origin.shape, strict=False)
    return next((place for place, (mine, theirs) in enumerate(pairs) if mine != theirs), 0)
