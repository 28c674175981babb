"""Operating the server: weights, and whether it lives.

In: mappings. Out: what changed. Whatever blocks runs in a thread of its own, so that generation goes on.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from amalgam.config import SourceName
from amalgam.errors import UnavailableError
from amalgam.server.body import MAX_JSON_KEYS, Body, NoFields, StrictRoute
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.errors import OrjsonResponse, error_response
from amalgam.server.service import Status, in_own_thread

if TYPE_CHECKING:
    from amalgam.engine.deployment import RemapResult

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
async def manifest(service: ServiceArgument, sha256: bool = False) -> Response:
    """Where every weight comes from: source, file, offset, bytes, format, the rule that chose it; and its layout.

    Layouts in `panels_…` run in the native kernels, others through PyTorch, expanded at each use unless dense.
    `sha256=true` adds the digest of each tensor's bytes, for which all files are read.
    """
    make = service.deployment.manifest
    return OrjsonResponse(await in_own_thread(lambda: make(sha256=sha256)))


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
