"""Filters: which there are, what they have found, and what they would make of a text.

In: a text. Out: figures, and the text as it would pass. What is found in the traffic is counted, never kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from amalgam.config.filters import FilterKind
from amalgam.errors import UnsupportedError
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.filters import FilterCount
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import Body, StrictRoute
from amalgam.server.service import Service, in_own_thread
from amalgam.text.filters.contract import Action, Where
from amalgam.text.filters.rules import Rule

router = APIRouter(route_class=StrictRoute, tags=["operation"])


class CheckBody(Body):
    text: str = Field(min_length=1)
    """The text."""
    where: Where = "prompts"
    """As what the filters are to look at it."""


class FilterEntry(BaseModel):
    name: str
    looks_for: FilterKind
    where: list[Where]
    action: Action
    max_chars: int
    """The longest match that a stream is held back for."""
    found: dict[str, dict[str, int]]
    """Since the start, in each kind of text, by what was done: an action, or `failed`."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class FiltersAnswer(BaseModel):
    filters: list[FilterEntry]
    blocked_prompt: Literal["error", "refusal"]


class FoundEntry(BaseModel):
    filter: str
    start: int
    """Of the text, the first character."""
    end: int
    """The one behind the last."""
    replacement: str

    model_config = ConfigDict(use_attribute_docstrings=True)


class CheckAnswer(BaseModel):
    text: str
    """As it passes; of a blocked one, up to where it is blocked."""
    found: list[FoundEntry]
    blocked_by: str | None

    model_config = ConfigDict(use_attribute_docstrings=True)


@router.get("/filters")
async def get_filters(service: ServiceArgument) -> FiltersAnswer:
    """The filters in their order, and how often each has found something."""
    filters = service.filters
    settings = service.settings.filters
    counts = await in_own_thread(service.filter_counts)
    entries = [] if filters is None else [_entry(service, counts, rule) for rule in filters.rules]
    return FiltersAnswer(filters=entries, blocked_prompt=settings.blocked_prompt)


@router.post("/filters/check")
async def check_text(body: CheckBody, request: Request, service: ServiceArgument) -> CheckAnswer:
    """What the filters would make of a text. It is not counted."""
    if service.filters is None:
        raise UnsupportedError("There are no filters here.", remedy="Set filters.rules.")
    work = service.filters.check(body.text, body.where, is_counted=False)
    example = await unless_client_leaves(request.receive, work)
    found = [
        FoundEntry(filter=item.rule.name, start=item.start, end=item.end, replacement=item.replacement)
        for item in example.found
    ]
    blocked_by = None if example.blocked_by is None else example.blocked_by.name
    return CheckAnswer(text=example.text, found=found, blocked_by=blocked_by)


def _entry(service: Service, counts: Mapping[FilterCount, int], rule: Rule) -> FilterEntry:
    setting = next(setting for setting in service.settings.filters.rules if setting.name == rule.name)
    found: dict[str, dict[str, int]] = {}
    for (name, where, action), count in counts.items():
        if name == rule.name:
            found.setdefault(where, {})[action] = count
    return FilterEntry(
        name=rule.name,
        looks_for=setting.kind,
        where=sorted(rule.where),
        action=rule.action,
        max_chars=rule.max_chars,
        found=found,
    )
