"""Operating the server: weights, expert statistics, and whether it lives.

In: mappings, windows of time. Out: what changed, counts, files. Whatever blocks runs in a thread of its own, so that
generation goes on.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from amalgam.config import SourceName
from amalgam.errors import UnavailableError, UnsupportedError
from amalgam.server.body import MAX_JSON_KEYS, Body, NoFields, StrictRoute
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.errors import OrjsonResponse, error_response
from amalgam.server.service import Status, in_own_thread

if TYPE_CHECKING:
    from amalgam.engine.deployment import Deployment, RemapResult
    from amalgam.experts.report import Export
    from amalgam.experts.tracker import ExpertTracker

# The modules of amalgam.experts are imported in worker threads: they import torch, and the port opens before that.

router = APIRouter(route_class=StrictRoute)

LogicalName = Annotated[str, Field(min_length=1, max_length=1024)]


class UpdateWeightMappingBody(Body):
    weight_mapping: dict[LogicalName, SourceName] = Field(min_length=1, max_length=MAX_JSON_KEYS)
    """Logical weight name or pattern → source. Replaces earlier entries of the same name, adds the rest."""


class WeightChangeAnswer(BaseModel):
    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str


class RemapAnswer(BaseModel):
    weight_version: int
    """The version that new requests start on; requests in flight finish on theirs."""
    previous_version: int
    fingerprint: str
    num_changed: int
    """Weights whose origin differs; 0 if both versions hold the same bytes."""
    changed: list[WeightChangeAnswer]
    num_loaded: int
    """Weights read from files; the others are shared with the previous version."""
    loaded_bytes: int
    shared_bytes: int
    seconds: float

    model_config = ConfigDict(use_attribute_docstrings=True)


class ExpertStatsBody(Body):
    top_k: int | None = Field(default=None, ge=1)
    """How many of the busiest experts; null: 10, or all where there are fewer."""
    minutes: float | None = Field(default=None, gt=0)
    """Count the last minutes only; null: since the last reset."""


class ExpertStatsQuery(ExpertStatsBody):
    model_config = ConfigDict(strict=False)  # a query holds nothing but strings


class ResetAnswer(BaseModel):
    activations: int
    tokens: int
    requests: int
    seconds: float
    """Since counting began, or since the reset before."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ExportBody(Body):
    format: Literal["json", "csv"] = "json"
    """json: everything that /expert_stats answers; csv: one line per expert."""


class ExportAnswer(BaseModel):
    file_name: str
    """The file's name in `server.export_dir`."""
    media_type: str
    content: str
    """The file's text."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class StatusAnswer(BaseModel):
    status: Status


@router.post("/update_weight_mapping", dependencies=[Admission], tags=["weights"])
async def update_weight_mapping(body: UpdateWeightMappingBody, service: ServiceArgument) -> RemapAnswer:
    """Take weights from other sources, while requests go on. A mapping that cannot be fulfilled changes nothing."""
    update = service.deployment.update_weight_mapping
    return _remap_answer(await in_own_thread(lambda: update(body.weight_mapping)))


@router.post("/reload_weights", dependencies=[Admission], tags=["weights"])
async def reload_weights(service: ServiceArgument, body: NoFields | None = None) -> RemapAnswer:
    """Build the weights anew from the files as they are now."""
    return _remap_answer(await in_own_thread(service.deployment.reload_weights))


@router.get("/manifest", tags=["weights"], response_model=dict[str, Any])
async def manifest(service: ServiceArgument) -> Response:
    """Where every weight comes from: source, file, offset, bytes, format, and the rule that chose it."""
    return OrjsonResponse(await in_own_thread(service.deployment.manifest))


@router.get("/expert_stats", tags=["experts"], response_model=dict[str, Any])
async def get_expert_stats(service: ServiceArgument, query: Annotated[ExpertStatsQuery, Query()]) -> Response:
    """Which experts the traffic uses: summary, layers, experts, the busiest, the most recent."""
    return await _expert_stats(service.deployment, query)


@router.post("/expert_stats", tags=["experts"], response_model=dict[str, Any])
async def post_expert_stats(service: ServiceArgument, body: ExpertStatsBody | None = None) -> Response:
    """The same, with the parameters in the body."""
    return await _expert_stats(service.deployment, body or ExpertStatsBody())


@router.post("/reset_expert_stats", tags=["experts"])
async def reset_expert_stats(service: ServiceArgument, body: NoFields | None = None) -> ResetAnswer:
    """Forget all counts; answers with what they were."""
    result = await asyncio.to_thread(_tracker(service.deployment).reset)
    return ResetAnswer(
        activations=result.num_activations,
        tokens=result.num_tokens,
        requests=result.num_requests,
        seconds=result.seconds,
    )


@router.post("/export_expert_stats", tags=["experts"])
async def export_expert_stats(service: ServiceArgument, body: ExportBody | None = None) -> ExportAnswer:
    """Write the statistics to a file in `server.export_dir`; answers with its name and content."""
    tracker = _tracker(service.deployment)
    folder = service.settings.server.export_dir
    format_name = (body or ExportBody()).format

    def write() -> Export:
        from amalgam.experts.report import export, write_export

        result = export(tracker.snapshot(), format_name)
        write_export(folder, result.file_name, result.text)
        return result

    result = await asyncio.to_thread(write)
    return ExportAnswer(file_name=result.file_name, media_type=result.media_type, content=result.text)


@router.get("/health", tags=["operation"], response_model=StatusAnswer)
async def health(service: ServiceArgument) -> StatusAnswer | Response:
    """Alive, which includes loading and draining; 503 once the model could not be loaded or the engine has died."""
    if service.failure is not None:
        return error_response(UnavailableError("The server has failed.", remedy="Its log has the cause."))
    return StatusAnswer(status=service.status)


@router.get("/ready", tags=["operation"], response_model=StatusAnswer)
async def ready(service: ServiceArgument) -> StatusAnswer:
    """Whether requests are taken; 503 while the server loads or drains."""
    service.check_ready()
    return StatusAnswer(status=service.status)


async def _expert_stats(deployment: Deployment, query: ExpertStatsBody) -> Response:
    tracker = _tracker(deployment)

    def describe() -> Response:
        from amalgam.experts.statistics import describe_experts

        return OrjsonResponse(describe_experts(tracker.snapshot(query.minutes), query.top_k))

    return await asyncio.to_thread(describe)


def _tracker(deployment: Deployment) -> ExpertTracker:
    if deployment.observer is None:
        raise UnsupportedError(
            "Expert statistics are not kept here.", remedy="Set statistics.enabled, and serve a model with experts."
        )
    return cast("ExpertTracker", deployment.observer)


def _remap_answer(result: RemapResult) -> RemapAnswer:
    return RemapAnswer(
        weight_version=result.version,
        previous_version=result.previous_version,
        fingerprint=result.fingerprint,
        num_changed=len(result.changed),
        changed=[WeightChangeAnswer(**asdict(change)) for change in result.changed],
        num_loaded=result.num_loaded,
        loaded_bytes=result.loaded_bytes,
        shared_bytes=result.shared_bytes,
        seconds=result.seconds,
    )
