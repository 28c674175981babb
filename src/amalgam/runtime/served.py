"""What is served: a weight version, the rules that it follows, and the loader that knows its files. One value."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.config.placement import Rule
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion


@dataclass(frozen=True)
class ServedWeights:
    """Who reads it once has three things that belong together, whatever goes live meanwhile."""

    loader: ModelLoader
    version: WeightVersion
    rules: tuple[Rule, ...]
    created_at: float = field(default_factory=time.time)  # Unix seconds

    @property
    def version_id(self) -> int:
        return self.version.version_id

    @property
    def spec(self) -> ModelSpec:
        return self.loader.spec


def shared_weights(planned: Sequence[PlannedWeight], *versions: WeightVersion) -> WeightVersion:
    """What a version that is to be built has in common with others; of several copies, that of the first."""
    weights: dict[str, PackedWeight] = {}
    keys: dict[str, tuple[Any, ...]] = {}
    for weight in planned:
        slot = weight.slot.name
        found = next((version for version in versions if version.keys.get(slot) == weight.key), None)
        if found is not None:
            weights[slot], keys[slot] = found[slot], weight.key
    return WeightVersion(0, weights, {}, keys)
