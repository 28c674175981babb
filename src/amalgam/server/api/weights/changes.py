"""Changes of the weights in the background: begun, followed, cancelled, looked up.

In: what is to be changed; a change's id. Out: how far it is, at once, again and again, or as events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from amalgam.errors import RequestError
from amalgam.runtime.jobs import JobStatus
from amalgam.server.api.weights.bodies import ChangeBody, WeightsName
from amalgam.server.dependencies import Admission, RequestId, ServiceArgument
from amalgam.server.events import EventStream, event
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import error_content
from amalgam.server.service import Service, Status

router = APIRouter(route_class=StrictRoute, tags=["weights"])

POLL_SECONDS = 0.2  # between two looks at a change that is followed


class StartBody(ChangeBody):
    """One of `weight_mapping`, `rules`, `reload`, `version` and `rollback`."""

    rollback: bool = False
    """Go back to the version before the current one."""
    name: WeightsName | None = None
    """Leave the current version, and make one that requests can ask for by this name. null: they start on it."""


class ChangeAnswer(BaseModel):
    id: str
    kind: str
    """What was asked for: mapping, rules, reload, version, rollback or undo; adopt: by a plan that follows traffic;
    failed_version: by nobody, the version before could not answer; start: of a process; earlier: that was not kept."""
    what: str
    """The same in a few words."""
    state: Literal["running", "done", "failed", "cancelled"]
    stage: str
    """What is being done now, or was done last."""
    done_bytes: int
    """Of the stage, as the weights are stored."""
    total_bytes: int
    num_done: int
    """Weights that have been read."""
    num_weights: int
    """Those that have to be; known once the change is planned."""
    started_at: float
    """Unix seconds."""
    ended_at: float | None
    seconds: float
    """Since it began, or that it took."""
    seconds_left: float | None
    """Of the stage, if it goes on as it did."""
    can_be_cancelled: bool
    """Until it goes live."""
    previous_version: int
    version: int | None
    """The version that it made, or that requests go on with; null until it has ended."""
    name: str | None
    """That the version was given; null: new requests start on it."""
    num_changed: int
    """Weights that differ from the version before."""
    loaded_bytes: int
    error: str | None
    """Why it changed nothing."""
    error_type: str | None

    model_config = ConfigDict(use_attribute_docstrings=True)


class ChangesAnswer(BaseModel):
    running: str | None
    """The id of the change under way."""
    changes: list[ChangeAnswer]
    """The latest 256, oldest first."""

    model_config = ConfigDict(use_attribute_docstrings=True)


@router.post("/weights/changes", dependencies=[Admission], status_code=202)
async def start_change(body: StartBody, response: Response, service: ServiceArgument) -> ChangeAnswer:
    """Begin a change and answer at once. While one is under way, another gets 409 with the first one's progress."""
    deployment = service.deployment
    if not body.rollback:
        status = deployment.start_change(body.request(body.name)).status()
    elif body.model_fields_set - {"rollback"}:
        raise RequestError("rollback is given with something else.", remedy="Give it alone.", param="rollback")
    else:
        status = deployment.start_rollback().status()
    response.headers["Location"] = f"weights/changes/{status.id}"
    return answer_of(status)


@router.get("/weights/changes")
async def list_changes(service: ServiceArgument) -> ChangesAnswer:
    """The changes so far, refused ones too."""
    jobs = service.deployment.jobs
    running = jobs.running
    return ChangesAnswer(
        running=None if running is None else running.id, changes=[answer_of(status) for status in jobs.read()]
    )


@router.get("/weights/changes/{change_id}")
async def get_change(change_id: str, service: ServiceArgument) -> ChangeAnswer:
    """One change: how far it is, or what came of it."""
    return answer_of(service.deployment.jobs.find(change_id))


@router.delete("/weights/changes/{change_id}")
async def cancel_change(change_id: str, service: ServiceArgument) -> ChangeAnswer:
    """Have a change give up: it ends at the next weight, and nothing has changed. 409 once it goes live."""
    return answer_of(service.deployment.jobs.cancel(change_id))


@router.get("/weights/changes/{change_id}/events", response_model=None)
async def follow_change(change_id: str, service: ServiceArgument, request_id: RequestId) -> Response:
    """Server-sent events: `progress` whenever it has got on, and at last `done`, `failed` or `cancelled`."""
    service.deployment.jobs.find(change_id)
    events = progress_events(service, change_id)
    return EventStream(
        events,
        events,
        lambda error: event(error_content(error, request_id), "error"),
        request_id,
        service.settings.server.stream_comment_seconds,
    )


async def progress_events(service: Service, change_id: str) -> AsyncGenerator[bytes]:
    """What `follow_change` sends. A server that drains says how far the change is, and leaves."""
    told = -1
    while True:
        is_last = service.status is Status.DRAINING
        revision, status = service.deployment.jobs.follow(change_id)
        if revision != told or status.has_ended or is_last:  # it may end between two readings
            told = revision
            yield event(asdict(status), "progress" if status.state == "running" else status.state)
        if status.has_ended or is_last:
            return
        await asyncio.sleep(POLL_SECONDS)


def answer_of(status: JobStatus) -> ChangeAnswer:
    return ChangeAnswer.model_validate(asdict(status))
