"""Where weights come from, and changes of it.

In: mappings. Out: what changed. Whatever blocks runs in a thread of its own, so that generation goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from amalgam.config.settings import SourceName
from amalgam.runtime.changes import RemapResult, WeightChange
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.http.body import MAX_JSON_KEYS, Body, StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import in_own_thread

router = APIRouter(route_class=StrictRoute, tags=["weights"])

NUM_EXAMPLES = 3

LogicalName = Annotated[str, Field(min_length=1, max_length=1024)]


class UpdateWeightMappingBody(Body):
    weight_mapping: dict[LogicalName, SourceName] = Field(min_length=1, max_length=MAX_JSON_KEYS)
    """Logical weight name or pattern → source. Replaces earlier entries of the same name, adds the rest."""
    details: bool = False
    """Answer with every weight that changed, in `changed`."""


class ReloadBody(Body):
    details: bool = False
    """Answer with every weight that changed, in `changed`."""


class WeightChangeAnswer(BaseModel):
    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int


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

    model_config = ConfigDict(use_attribute_docstrings=True)


class RemapAnswer(BaseModel):
    weight_version: int
    """The version that new requests start on; requests in flight finish on theirs."""
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


@router.post("/update_weight_mapping", dependencies=[Admission], response_model_exclude_none=True)
async def update_weight_mapping(body: UpdateWeightMappingBody, service: ServiceArgument) -> RemapAnswer:
    """Take weights from other sources, while requests go on. A mapping that cannot be fulfilled changes nothing."""
    update = service.deployment.update_weight_mapping
    return remap_answer(await in_own_thread(lambda: update(body.weight_mapping)), details=body.details)


@router.post("/reload_weights", dependencies=[Admission], response_model_exclude_none=True)
async def reload_weights(service: ServiceArgument, body: ReloadBody | None = None) -> RemapAnswer:
    """Build the weights anew from the files as they are now."""
    details = body is not None and body.details
    return remap_answer(await in_own_thread(service.deployment.reload_weights), details=details)


@router.get("/manifest", response_model=dict[str, Any])
async def manifest(service: ServiceArgument, sha256: bool = False) -> Response:
    """Where every weight comes from: source, file, offset, bytes, format, the rule that chose it; and its layout.

    Layouts in `panels_…` run in the native kernels, others through PyTorch, expanded at each use unless dense.
    `sha256=true` adds the digest of each tensor's bytes, for which all files are read.
    """
    make = service.deployment.manifest
    return OrjsonResponse(await in_own_thread(lambda: make(sha256=sha256)))


def remap_answer(result: RemapResult, *, details: bool = False) -> RemapAnswer:
    """What a change of the weights answers."""
    return RemapAnswer(
        weight_version=result.version,
        previous_version=result.previous_version,
        fingerprint=result.fingerprint,
        num_changed=len(result.changed),
        changes=_summary(result.changed),
        changed=[WeightChangeAnswer(**asdict(change)) for change in result.changed] if details else None,
        num_loaded=result.num_loaded,
        loaded_bytes=result.loaded_bytes,
        shared_bytes=result.shared_bytes,
        seconds=result.seconds,
    )


def _summary(changed: Sequence[WeightChange]) -> list[ChangeSummary]:
    """By sources and formats, those of most weights first."""
    groups: dict[tuple[str, ...], list[WeightChange]] = defaultdict(list)
    for change in changed:
        groups[change.source_before, change.source_after, change.format_before, change.format_after].append(change)
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
        )
        for (source_before, source_after, format_before, format_after), group in sorted(
            groups.items(), key=lambda item: -len(item[1])
        )
    ]
