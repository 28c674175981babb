"""What is served: a weight version, the rules that it follows, and the loader that knows its files. One value."""

from __future__ import annotations

from dataclasses import dataclass

from amalgam.composition.loader import ModelLoader
from amalgam.config.settings import Rule
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion


@dataclass(frozen=True)
class ServedWeights:
    """Who reads it once has three things that belong together, whatever goes live meanwhile."""

    loader: ModelLoader
    version: WeightVersion
    rules: tuple[Rule, ...]

    @property
    def spec(self) -> ModelSpec:
        return self.loader.spec
