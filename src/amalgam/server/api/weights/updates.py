"""The weights in use: a change of their mapping, the files read anew, and where each weight comes from.

In: mappings. Out: what changed. Whatever blocks runs in a thread of its own, so that generation goes on.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import ConfigDict
from starlette.responses import Response

from amalgam.runtime.changes import ChangeRequest
from amalgam.server.api.weights.answers import PlanAnswer, RemapAnswer, plan_answer, remap_answer
from amalgam.server.api.weights.bodies import WeightMapping, placements
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.http.body import Body, StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.interface import Deployment
from amalgam.server.service import in_own_thread

router = APIRouter(route_class=StrictRoute, tags=["weights"])


class UpdateWeightMappingBody(Body):
    weight_mapping: WeightMapping
    """Logical weight name or pattern → source, or {"source": …, "device": …}: what is left out of it stays as it is.
    Replaces rules of the same name, adds the rest; null removes one."""
    dry_run: bool = False
    """Answer what would change and what it would take; nothing changes."""
    details: bool = False
    """Answer with every weight that changed, in `changed`."""


class ReloadBody(Body):
    dry_run: bool = False
    """Answer what would change and what it would take; nothing changes."""
    details: bool = False
    """Answer with every weight that changed, in `changed`."""


class ManifestQuery(Body):
    model_config = ConfigDict(strict=False)  # a query holds nothing but strings

    sha256: bool = False
    """Answer with the digest of each tensor's bytes, for which all files are read."""


@router.post("/update_weight_mapping", dependencies=[Admission], response_model_exclude_none=True)
async def update_weight_mapping(body: UpdateWeightMappingBody, service: ServiceArgument) -> RemapAnswer | PlanAnswer:
    """Take weights from other sources, while requests go on. A mapping that cannot be fulfilled changes nothing."""
    deployment, mapping = service.deployment, placements(body.weight_mapping)
    if body.dry_run:
        return await planned(deployment, ChangeRequest(mapping), details=body.details)
    result = await in_own_thread(lambda: deployment.update_weight_mapping(mapping))
    return remap_answer(result, details=body.details)


@router.post("/reload_weights", dependencies=[Admission], response_model_exclude_none=True)
async def reload_weights(service: ServiceArgument, body: ReloadBody | None = None) -> RemapAnswer | PlanAnswer:
    """Build the weights anew from the files as they are now."""
    deployment, body = service.deployment, body or ReloadBody()
    if body.dry_run:
        return await planned(deployment, ChangeRequest(is_reload=True), details=body.details)
    return remap_answer(await in_own_thread(deployment.reload_weights), details=body.details)


@router.get("/manifest", response_model=dict[str, Any])
async def manifest(service: ServiceArgument, query: Annotated[ManifestQuery, Query()]) -> Response:
    """Where every weight comes from: source, file, offset, bytes, format, the rule that chose it; and its layout.

    Layouts in `panels_…` run in the native kernels, others through PyTorch, expanded at each use unless dense.
    `sha256=true` adds the digest of each tensor's bytes, for which all files are read.
    """
    make = service.deployment.manifest
    return OrjsonResponse(await in_own_thread(lambda: make(sha256=query.sha256)))


async def planned(deployment: Deployment, request: ChangeRequest, *, details: bool) -> PlanAnswer:
    """What a change would be; nothing changes."""
    return plan_answer(await in_own_thread(lambda: deployment.plan_change(request)), details=details)
