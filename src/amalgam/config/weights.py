"""Settings of changes of the weights while they serve: section `weights`."""

from __future__ import annotations

from pydantic import Field

from amalgam.config.fields import Section, UserPath
from amalgam.config.names import MAX_KEPT, WeightsName
from amalgam.config.placement import Pattern, PlacementValue


class WeightsSettings(Section):
    """Changes of the weights while they serve."""

    history: UserPath = ""
    """File that keeps what has changed the weights across restarts, one process' own. Empty: it ends with it."""
    resume: bool = False
    """Start by the rules of the last version that new requests started on, and with those that had names or pins."""
    named: dict[WeightsName, dict[Pattern, PlacementValue]] = Field(default_factory=dict, max_length=MAX_KEPT)
    """Versions that requests can ask for, made at the start: name → all its rules, as in `weight_mapping`."""
    watch_seconds: float = Field(default=0.0, ge=0, le=86400)
    """How often the server looks at its configuration file, whose rules come into use when they change. 0: never."""
    look_ahead: bool = True
    """Open the sources that no weight comes from yet once the server has started, so that the first change that uses
    one takes no longer than others."""
