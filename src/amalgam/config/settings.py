"""Every setting, as one frozen pydantic model: a field for each section, which has a module of the same name.

In: a nested mapping. Out: one immutable `Settings`. The command line's flags, `amalgam config` and
`docs/configuration.md` are generated from the fields (`keys.py`). Must never know: files, the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError, model_validator

from amalgam.config.cluster import ClusterSettings
from amalgam.config.engine import EngineSettings
from amalgam.config.explaining import explain
from amalgam.config.fields import Section
from amalgam.config.filters import FiltersSettings
from amalgam.config.inference import InferenceSettings
from amalgam.config.model import ModelSettings
from amalgam.config.placement import check_declared
from amalgam.config.planning import PlanningSettings
from amalgam.config.server import ServerSettings
from amalgam.config.speculation import SpeculationSettings
from amalgam.config.statistics import StatisticsSettings
from amalgam.config.weights import WeightsSettings
from amalgam.errors import ConfigError


class Settings(Section):
    """Everything, as `config/model_config.yaml` holds it."""

    model: ModelSettings
    """The model and its checkpoints."""
    inference: InferenceSettings = InferenceSettings()
    """How the model runs."""
    server: ServerSettings = ServerSettings()
    """The HTTP server."""
    engine: EngineSettings = EngineSettings()
    """The step loop and the KV cache."""
    statistics: StatisticsSettings = StatisticsSettings()
    """Expert statistics."""
    planning: PlanningSettings = PlanningSettings()
    """Plans for a budget."""
    weights: WeightsSettings = WeightsSettings()
    """Changes of the weights while they serve."""
    speculation: SpeculationSettings = SpeculationSettings()
    """Tokens that are guessed ahead."""
    filters: FiltersSettings = FiltersSettings()
    """What may not pass in prompts, answers and logs."""
    cluster: ClusterSettings = ClusterSettings()
    """Several replicas behind one address."""

    @model_validator(mode="after")
    def _check_named(self) -> Settings:
        check_declared(
            (
                (f"weights.named[{name!r}][{pattern!r}]", placement.source)
                for name, mapping in self.weights.named.items()
                for pattern, placement in mapping.items()
            ),
            self.model.mixed_precision.sources,
        )
        return self

    def replace(self, **sections: Any) -> Settings:
        """A new object with whole sections exchanged, validated again."""
        return build_settings({**self.model_dump(), **sections})


def build_settings(data: Mapping[str, Any], origins: Mapping[str, str] | None = None) -> Settings:
    """Validate a nested mapping.

    Args:
        origins: dotted key → where its value comes from, for messages.

    Raises:
        ConfigError: naming each offending key, its value and what is allowed.
    """
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        raise ConfigError("Configuration is invalid:\n" + "\n".join(explain(error, Settings, origins))) from None
