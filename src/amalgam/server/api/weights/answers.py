"""What answers about weights have in common: what changed, by sources and formats.

In: results of changes. Out: JSON. Must never know: requests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from amalgam.runtime.changes import RemapResult, WeightChange

if TYPE_CHECKING:
    from amalgam.runtime.preview import ChangePlan

NUM_EXAMPLES = 3

LogicalName = Annotated[str, Field(min_length=1, max_length=1024)]


class WeightChangeAnswer(BaseModel):
    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int
    device_before: str | None = None
    device_after: str | None = None
    """null: the device that the model runs on."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ChangeSummary(BaseModel):
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    num_weights: int
    bytes_before: int
    bytes_after: int
    examples: list[str]
    """Names of the first few."""
    device_before: str | None = None
    device_after: str | None = None
    """null: the device that the model runs on."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class RemapAnswer(BaseModel):
    weight_version: int
    """The version that new requests start on, or that has the name; requests in flight finish on theirs."""
    name: str | None = None
    """That requests can ask for, if it was to have one."""
    previous_version: int
    fingerprint: str
    num_changed: int
    """Weights whose origin differs; 0 if both versions hold the same bytes."""
    changes: list[ChangeSummary]
    """Those weights, by what they were and what they are."""
    changed: list[WeightChangeAnswer] | None = None
    """Each of them. Only if asked for."""
    num_loaded: int
    """Weights read from files; the others are shared with the previous version."""
    loaded_bytes: int
    shared_bytes: int
    seconds: float

    model_config = ConfigDict(use_attribute_docstrings=True)


class RuleAnswer(BaseModel):
    pattern: str
    source: str | None = None
    device: str | None = None

    @model_serializer(mode="plain")
    def _as_written(self) -> dict[str, str]:
        return {name: value for name, value in dict(self).items() if value is not None}


class DeviceAnswer(BaseModel):
    bytes: int
    """Of the version's weights there."""
    new_bytes: int
    """Of those that have to be brought there."""
    used_bytes: int
    """Of all weights that are there now, of every version."""
    limit_bytes: int | None = None
    """That weights may take; null: as much as there is."""
    available_bytes: int
    """For more weights."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class PlanAnswer(BaseModel):
    dry_run: Literal[True] = True
    """Nothing has changed."""
    version: int | None = None
    """That is in memory and would come back; null: one would be built."""
    previous_version: int
    """The current one, that all is compared with."""
    fingerprint: str
    num_rules: int
    """That would hold."""
    rules: list[RuleAnswer] | None = None
    """They, in order. Only if asked for."""
    num_changed: int
    changes: list[ChangeSummary]
    changed: list[WeightChangeAnswer] | None = None
    """Each weight that would change. Only if asked for."""
    num_loaded: int
    """Weights that no version in memory has."""
    read_bytes: int
    """Of their files."""
    new_bytes: int
    """Of memory that they would take; pages of the packed cache are none."""
    shared_bytes: int
    """Of weights that are there already."""
    peak_bytes: int
    """Of memory that would be taken at most while they are loaded."""
    available_bytes: int
    """Of memory now."""
    has_room: bool
    """False: the change would be refused."""
    devices: dict[str, DeviceAnswer] | None = None
    """By device. null: all is on one, without a limit."""
    seconds: float
    """That it would take, as fast as weights were loaded so far."""

    model_config = ConfigDict(use_attribute_docstrings=True)


def plan_answer(plan: ChangePlan, *, details: bool = False) -> PlanAnswer:
    """What a change would be."""
    return PlanAnswer(
        version=plan.version,
        previous_version=plan.previous_version,
        fingerprint=plan.fingerprint,
        num_rules=len(plan.rules),
        rules=[RuleAnswer(**rule.model_dump()) for rule in plan.rules] if details else None,
        num_changed=len(plan.changed),
        changes=summary(plan.changed),
        changed=listed(plan.changed) if details else None,
        num_loaded=plan.load.num_weights,
        read_bytes=plan.load.read_bytes,
        new_bytes=plan.load.new_bytes,
        shared_bytes=plan.shared_bytes,
        peak_bytes=plan.load.peak_bytes,
        available_bytes=plan.available_bytes,
        has_room=plan.has_room,
        devices={name: DeviceAnswer(**asdict(device)) for name, device in plan.devices.items()} or None,
        seconds=plan.seconds,
    )


def listed(changed: Sequence[WeightChange]) -> list[WeightChangeAnswer]:
    """Each of them."""
    return [WeightChangeAnswer(**asdict(change)) for change in changed]


def remap_answer(result: RemapResult, *, details: bool = False) -> RemapAnswer:
    """What a change of the weights answers."""
    return RemapAnswer(
        weight_version=result.version,
        name=result.name,
        previous_version=result.previous_version,
        fingerprint=result.fingerprint,
        num_changed=len(result.changed),
        changes=summary(result.changed),
        changed=listed(result.changed) if details else None,
        num_loaded=result.num_loaded,
        loaded_bytes=result.loaded_bytes,
        shared_bytes=result.shared_bytes,
        seconds=result.seconds,
    )


def summary(changed: Sequence[WeightChange]) -> list[ChangeSummary]:
    """By sources, formats and devices, those of most weights first."""
    groups: dict[tuple[str, str, str, str, str | None, str | None], list[WeightChange]] = defaultdict(list)
    for change in changed:
        key = (
            change.source_before,
            change.source_after,
            change.format_before,
            change.format_after,
            change.device_before,
            change.device_after,
        )
        groups[key].append(change)
    return [
        ChangeSummary(
            source_before=source_before,
            source_after=source_after,
            format_before=format_before,
            format_after=format_after,
            num_weights=len(group),
            bytes_before=sum(change.bytes_before for change in group),
            bytes_after=sum(change.bytes_after for change in group),
            examples=[change.name for change in group[:NUM_EXAMPLES]],
            device_before=device_before,
            device_after=device_after,
        )
        for key, group in sorted(groups.items(), key=lambda item: -len(item[1]))
        for source_before, source_after, format_before, format_after, device_before, device_after in [key]
    ]
