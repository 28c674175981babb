"""What a change of the weights asks for, as JSON.

In: fields. Out: a `ChangeRequest`. Must never know: how it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from amalgam.config.devices import DeviceName
from amalgam.config.placement import Placement, PlacementLike, Rule, SourceName, source_alone
from amalgam.runtime.changes import ChangeRequest
from amalgam.server.api.common import AskedWeights
from amalgam.server.api.weights.answers import LogicalName
from amalgam.server.http.body import MAX_JSON_KEYS, Body

WeightsName = Annotated[str, Field(min_length=1, max_length=64)]


class PlacementBody(Body):
    """One of both, or both."""

    source: SourceName | None = None
    """The source that matching weights come from. null: as another rule says, else the default source."""
    device: DeviceName | None = None
    """The device that matching experts lie on. null: as another rule says, else the one that the model runs on."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if self.source is None and self.device is None:
            raise ValueError("neither a source nor a device is given")
        return self

    @property
    def placement(self) -> PlacementLike:
        """As short as it can be."""
        if self.source is not None and self.device is None:
            return self.source
        return Placement(source=self.source, device=self.device)


class RuleBody(PlacementBody):
    pattern: LogicalName
    """Logical weight name, or a pattern."""


def _source_alone(value: Any) -> Any:
    return None if value is None else source_alone(value)


PlacementValue = Annotated[
    PlacementBody | None, BeforeValidator(_source_alone, json_schema_input_type=SourceName | PlacementBody | None)
]
WeightMapping = Annotated[dict[LogicalName, PlacementValue], Field(min_length=1, max_length=MAX_JSON_KEYS)]


def placements(mapping: Mapping[str, PlacementBody | None]) -> dict[str, PlacementLike | None]:
    """A mapping as changes take it."""
    return {pattern: None if value is None else value.placement for pattern, value in mapping.items()}


class ChangeBody(Body):
    """One of `weight_mapping`, `rules`, `reload` and `version`."""

    weight_mapping: WeightMapping | None = None
    """Logical weight name or pattern → source, or {"source": …, "device": …}: what is left out of it stays as it is.
    Replaces rules of the same name, adds the rest; null removes one."""
    rules: list[RuleBody] | None = Field(default=None, max_length=MAX_JSON_KEYS, fail_fast=True)
    """All rules that are to hold, in order; `[]`: everything from the default source."""
    reload: bool = False
    """The current rules, of the files as they are now."""
    version: AskedWeights | None = None
    """A version to go back to, by name or id: itself if it is in memory, otherwise what its rules give now."""

    def request(self, name: str | None = None) -> ChangeRequest:
        """
        Args:
            name: what the version is called; None: new requests start on it.

        Raises:
            RequestError: not exactly one thing is asked for.
        """
        given: dict[str, Any] = {}
        if self.rules is not None:
            given["rules"] = tuple(
                Rule(pattern=rule.pattern, source=rule.source, device=rule.device) for rule in self.rules
            )
        mapping = None if self.weight_mapping is None else placements(self.weight_mapping)
        return ChangeRequest(mapping, is_reload=self.reload, version=self.version, name=name, **given)
