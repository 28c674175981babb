"""One expert: how much it is used, and where each of its projections comes from.

In: a layer and an expert. Out: a few figures; the page asks for them at each click, and the whole of `/expert_stats`
would be megabytes for a large model.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.responses import Response

from amalgam.server.api.queries import SharedQuery, share
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


class ExpertQuery(SharedQuery):
    layer_id: int = Field(ge=0)
    expert_id: int = Field(ge=0)


@router.get("/dashboard/expert")
async def expert(service: ServiceArgument, query: Annotated[ExpertQuery, Query()]) -> Response:
    """The use since the last reset, and the projections, of one expert."""
    describe = service.deployment.expert_info
    return await share(service, "expert", query, lambda: describe(query.layer_id, query.expert_id))
