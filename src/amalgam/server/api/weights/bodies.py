"""What a change of the weights asks for, as JSON.

In: fields. Out: a `ChangeRequest`. Must never know: how it is made.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from amalgam.config.settings import Rule, SourceName
from amalgam.runtime.changes import ChangeRequest
from amalgam.server.api.common import AskedWeights
from amalgam.server.api.weights.answers import LogicalName
from amalgam.server.http.body import MAX_JSON_KEYS, Body

WeightMapping = Annotated[dict[LogicalName, SourceName | None], Field(min_length=1, max_length=MAX_JSON_KEYS)]
WeightsName = Annotated[str, Field(min_length=1, max_length=64)]


class RuleBody(Body):
    pattern: LogicalName
    """Logical weight name, or a pattern."""
    source: SourceName
    """The source that matching weights come from."""


class ChangeBody(Body):
    """One of `weight_mapping`, `rules`, `reload` and `version`."""

    weight_mapping: WeightMapping | None = None
    """Logical weight name or pattern → source. Replaces rules of the same name, adds the rest; null removes one."""
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
            given["rules"] = tuple(Rule(pattern=rule.pattern, source=rule.source) for rule in self.rules)
        return ChangeRequest(self.weight_mapping, is_reload=self.reload, version=self.version, name=name, **given)
