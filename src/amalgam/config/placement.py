"""Which source weights come from, and on which device they lie: what callers and files say, as rules.

In: names, patterns and placements as people write them. Out: rules in order. Must never know: weights, checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StringConstraints, ValidationError, model_serializer, model_validator

from amalgam.config.devices import DeviceName
from amalgam.config.explaining import explain
from amalgam.config.fields import Section
from amalgam.errors import ConfigError

BASE_SOURCE = "base"
PATH_SUFFIX = "_path"
_SOURCE_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"

SourceName = Annotated[str, StringConstraints(pattern=_SOURCE_NAME)]
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=1024)]


class Placement(Section):
    """Which source weights come from, and on which device they lie: one of them, or both.

    What is left out stays as it is without: by the next weaker rule that says it, else the default source and the
    device of `inference.device_map`.
    """

    source: str | None = Field(default=None, pattern=_SOURCE_NAME)
    """The source that matching weights come from."""
    device: DeviceName | None = None
    """The device that matching weights of experts lie on: `cpu`, `cuda`, `cuda:N`, or one of inference.devices."""

    @model_validator(mode="after")
    def _check_not_empty(self) -> Placement:
        if self.source is None and self.device is None:
            raise ValueError("neither a source nor a device is given. Expected a source's name, or {source, device}")
        return self

    def over(self, earlier: Placement | None) -> Placement:
        """What holds if both are said, one after the other."""
        if earlier is None:
            return Placement(source=self.source, device=self.device)
        return Placement(source=self.source or earlier.source, device=self.device or earlier.device)

    @model_serializer(mode="plain")
    def _as_written(self) -> Any:
        """As short as people write it."""
        return self.source if self.device is None else {k: v for k, v in dict(self).items() if v is not None}


class Rule(Placement):
    """One rule of the weight mapping."""

    pattern: Pattern
    """Logical weight name, or a pattern: `*`, `?`, `[abc]`, `{a,b}` and `{0-15}`."""

    @model_serializer(mode="plain")
    def _as_written(self) -> Any:
        found = {"pattern": self.pattern, "source": self.source, "device": self.device}
        return {key: value for key, value in found.items() if value is not None}


def source_alone(value: Any) -> Any:
    """A placement as a mapping of its fields; a text is a source's name."""
    if isinstance(value, str):
        return {"source": value}
    if not isinstance(value, Mapping | Placement):
        raise ValueError("it is no placement. Expected a source's name, or {source, device}")
    return value


PlacementValue = Annotated[Placement, BeforeValidator(source_alone)]
"""A source's name, or a `Placement`."""
PlacementLike = str | Placement | Mapping[str, Any]
"""The same, as callers give it."""


def build_rules(mapping: Mapping[str, PlacementLike]) -> tuple[Rule, ...]:
    """Rules from name or pattern → source or placement, in order.

    Raises:
        ConfigError: an empty pattern, an impossible name of a source or device.
    """
    try:
        return tuple(_rule(pattern, value) for pattern, value in mapping.items())
    except ValidationError as error:
        raise ConfigError("weight_mapping is invalid:\n" + "\n".join(explain(error, Rule))) from None


def placing(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """What rules say of devices, without the sources."""
    return tuple(Rule(pattern=rule.pattern, device=rule.device) for rule in rules if rule.device is not None)


def check_declared(used: Iterable[tuple[str, str | None]], sources: Iterable[str]) -> None:
    """Every source that is named has to be declared.

    Args:
        used: where a source may be named, for the message, and its name or None.
        sources: that are declared, beside the base.

    Raises:
        ValueError: one that is not declared.
    """
    declared = {BASE_SOURCE, *sources}
    for where, source in used:
        if source is not None and source not in declared:
            raise ValueError(
                f"{where} names source {source!r}, which is not declared. Declared: {', '.join(sorted(declared))}. "
                f"Add model.mixed_precision.{source}{PATH_SUFFIX} or correct the name"
            )


def _rule(pattern: str, value: PlacementLike) -> Rule:
    if isinstance(value, Placement):
        return Rule(pattern=pattern, source=value.source, device=value.device)
    return Rule.model_validate(
        {"source": value, "pattern": pattern} if isinstance(value, str) else {**value, "pattern": pattern}
    )
