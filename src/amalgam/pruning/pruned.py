"""A model behind a cut: its config.json, its spec, and where each of its weights comes from.

In: a family, a config.json, a cut. Out: `Pruned`. Must never know: files, how the cut was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from amalgam.errors import AmalgamError, UnsupportedError
from amalgam.models.registry import read_spec
from amalgam.models.spec import ModelSpec, Slot
from amalgam.pruning.config import cut_config
from amalgam.pruning.cut import Cut, Load


@dataclass(frozen=True, eq=False)
class Pruned:
    """
    Attributes:
        whole: spec of the model that was cut.
        config, spec: of what remains.
        origins: slot → the whole model's slot that it comes from.
    """

    cut: Cut
    whole: ModelSpec
    config: Mapping[str, Any]
    spec: ModelSpec
    origins: Mapping[str, Slot]

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        place: str,
        spec: ModelSpec,
        cut: Cut,
        widths: Mapping[int, int] | None = None,
    ) -> Pruned:
        """
        Args:
            config, place, spec: of the whole model.
            widths: see `cut_config`.

        Raises:
            UnsupportedError: the family's configuration cannot say this cut.
        """
        changed = cut_config(config, spec, cut, widths)
        try:
            _, smaller = read_spec(changed, f"{place}, changed,")
        except AmalgamError as error:
            raise UnsupportedError(
                f"The configuration of {spec.family} cannot say this cut: {error.what}",
                remedy="Leave out as much of every layer (experts: without --per-layer), or less.",
            ) from error
        slots = {slot.name: slot for slot in spec.slots}
        kept = tuple(spec.layers[layer_id] for layer_id in cut.layers)
        names = {slot.name: cut.origin(slot.name) for slot in smaller.slots}
        same = slots.keys() >= set(names.values())
        same = same and replace(smaller, layers=()) == replace(
            spec, layers=(), num_draft_layers=smaller.num_draft_layers
        )
        if not same or [layer.attention for layer in smaller.layers] != [layer.attention for layer in kept]:
            raise UnsupportedError(
                f"The configuration of {spec.family} cannot say that these layers remain: {list(cut.layers)}.",
                remedy="Its layers depend on each other, or on their number. Prune experts or channels instead.",
            )
        origins = {name: slots[origin] for name, origin in names.items()}
        for slot in smaller.slots:
            cut.check(slot, origins[slot.name])
        return cls(cut, spec, changed, smaller, origins)

    def is_same(self, slot: Slot) -> bool:
        """Whether a slot has its origin's values."""
        return self.cut.is_same(slot, self.origins[slot.name])

    def values(self, slot: Slot, load: Load) -> Tensor:
        """A weight of what remains, in the type that the whole model has it in."""
        return self.cut.values(slot, self.origins[slot.name], load)

    @cached_property
    def successors(self) -> dict[str, Slot]:
        """Slot of the whole model → the slot that it has become; without those that are gone."""
        slots = {slot.name: slot for slot in self.spec.slots}
        return {origin.name: slots[name] for name, origin in self.origins.items()}
