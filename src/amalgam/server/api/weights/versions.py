"""Weight versions: what is in memory, in what two differ, a change as it would be made, going back, names and pins.

In: names and ids. Out: JSON. Whatever blocks runs in a thread of its own, so that generation goes on.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from amalgam.server.api.common import AskedWeights
from amalgam.server.api.weights.answers import (
    ChangeSummary,
    PlanAnswer,
    RemapAnswer,
    RuleAnswer,
    WeightChangeAnswer,
    listed,
    remap_answer,
    summary,
)
from amalgam.server.api.weights.bodies import ChangeBody, WeightsName
from amalgam.server.api.weights.changes import ChangeAnswer, answer_of
from amalgam.server.api.weights.updates import planned
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.http.body import Body, NoFields, StrictRoute
from amalgam.server.service import in_own_thread

router = APIRouter(route_class=StrictRoute, tags=["weights"])

Asked = Annotated[str, Field(min_length=1, max_length=64)]
AskedInPath = Annotated[str, Path(min_length=1, max_length=64)]
VersionId = Annotated[int, Path(ge=1, le=2**53)]


class VersionAnswer(BaseModel):
    version: int
    states: list[str]
    """Why it is in memory: `current`, `pinned`, `named`, `candidate`, `fallback`, or nothing but `draining`."""
    names: list[str]
    """That requests can ask for, beside its number."""
    pinned: bool
    fingerprint: str
    rules: list[RuleAnswer]
    bytes: int
    own_bytes: int
    """Of weights that no other version in memory has."""
    bytes_by_format: dict[str, int]
    bytes_by_device: dict[str, int]
    created: float
    """Unix seconds."""
    age_seconds: float
    requests: int
    """That run on it now."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class WeightsAnswer(BaseModel):
    current: int
    """The version that new requests start on."""
    versions: list[VersionAnswer]
    """All that are in memory: the current one, then the newest."""
    bytes: int
    """What they take together; shared weights count once."""
    available_bytes: int
    """Of memory for more."""
    change: ChangeAnswer | None
    """The change under way."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class DifferenceAnswer(BaseModel):
    before: int
    after: int
    num_changed: int
    changes: list[ChangeSummary]
    """The weights that differ, by what they are in both."""
    changed: list[WeightChangeAnswer] | None = None
    """Each of them. Only if asked for."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class DifferenceQuery(Body):
    model_config = ConfigDict(strict=False)  # a query holds nothing but strings

    before: Asked
    """A version, by name or id."""
    after: Asked = "current"
    """The one that it is compared with."""
    details: bool = False
    """Answer with every weight that differs, in `changed`."""


class PlanBody(ChangeBody):
    name: WeightsName | None = None
    """That the version would get beside the current one: whether it may have it is checked, too."""
    details: bool = False
    """Answer with every weight that would change, in `changed`, and with the rules that would hold."""


class NameBody(ChangeBody):
    details: bool = False
    """Answer with every weight that differs from the current version, in `changed`."""


class RollbackBody(Body):
    version: AskedWeights | None = None
    """By name or id: itself if it is in memory, otherwise what its rules give now. null: the one before."""
    details: bool = False
    """Answer with every weight that changed, in `changed`."""


class PinAnswer(BaseModel):
    weight_version: int
    pinned: bool


class NameAnswer(BaseModel):
    name: str
    weight_version: int
    """That it stood for."""

    model_config = ConfigDict(use_attribute_docstrings=True)


@router.get("/weights")
async def weights(service: ServiceArgument) -> WeightsAnswer:
    """The weight versions in memory, the requests on each, and the change under way."""
    deployment = service.deployment
    described, running = await in_own_thread(deployment.describe_weights), deployment.jobs.running
    return WeightsAnswer(**described, change=None if running is None else answer_of(running.status()))


@router.get("/weights/versions/{version}")
async def version(version: AskedInPath, service: ServiceArgument) -> VersionAnswer:
    """One weight version, by name or id."""
    describe = service.deployment.describe_version
    return VersionAnswer(**await in_own_thread(lambda: describe(version)))


@router.get("/weights/difference", response_model_exclude_none=True)
async def difference(service: ServiceArgument, query: Annotated[DifferenceQuery, Query()]) -> DifferenceAnswer:
    """The weights in which two versions differ. Of versions that have left memory it is known what their rules give."""
    compare = service.deployment.difference
    found = await in_own_thread(lambda: compare(query.before, query.after))
    return DifferenceAnswer(
        before=found.before,
        after=found.after,
        num_changed=len(found.changed),
        changes=summary(found.changed),
        changed=listed(found.changed) if query.details else None,
    )


@router.post("/weights/plan", dependencies=[Admission], response_model_exclude_none=True)
async def plan(body: PlanBody, service: ServiceArgument) -> PlanAnswer:
    """What a change would change and take. Nothing is loaded, nothing changes."""
    return await planned(service.deployment, body.request(body.name), details=body.details)


@router.post("/weights/rollback", dependencies=[Admission], response_model_exclude_none=True)
async def rollback(service: ServiceArgument, body: RollbackBody | None = None) -> RemapAnswer:
    """Let new requests start on an earlier version again."""
    body = body or RollbackBody()
    go_back = service.deployment.rollback
    return remap_answer(await in_own_thread(lambda: go_back(body.version)), details=body.details)


@router.put("/weights/pins/{version}", dependencies=[Admission])
async def pin(version: VersionId, service: ServiceArgument, body: NoFields | None = None) -> PinAnswer:
    """Keep a version in memory until it is unpinned; requests can ask for it."""
    versions = service.deployment.versions
    await in_own_thread(lambda: versions.pin(version))
    return PinAnswer(weight_version=version, pinned=True)


@router.delete("/weights/pins/{version}", dependencies=[Admission])
async def unpin(version: VersionId, service: ServiceArgument) -> PinAnswer:
    """Keep a version no longer, unless it is current or has a name."""
    versions = service.deployment.versions
    await in_own_thread(lambda: versions.unpin(version))
    return PinAnswer(weight_version=version, pinned=False)


@router.put("/weights/named/{name}", dependencies=[Admission], response_model_exclude_none=True)
async def put_name(name: AskedInPath, body: NameBody, service: ServiceArgument) -> RemapAnswer:
    """Name a version that requests can ask for, beside the current one. A mapping is of the current rules."""
    change = service.deployment.change
    request = body.request(name)
    return remap_answer(await in_own_thread(lambda: change(request)), details=body.details)


@router.delete("/weights/named/{name}", dependencies=[Admission])
async def delete_name(name: AskedInPath, service: ServiceArgument) -> NameAnswer:
    """Take a name away; requests that have begun go on."""
    versions = service.deployment.versions
    served = await in_own_thread(lambda: versions.remove_name(name))
    return NameAnswer(name=name, weight_version=served.version_id)
