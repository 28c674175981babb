"""What the page must know of the expert statistics before it asks for any.

In: the service. Out: whether anything is counted. That nothing is counted is an answer here, not an error.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from amalgam.server.body import StrictRoute
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.errors import OrjsonResponse
from amalgam.server.service import Service

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


@router.get("/dashboard/statistics")
async def statistics(service: ServiceArgument) -> Response:
    """Whether the use of experts is counted."""
    return OrjsonResponse(describe_statistics(service))


def describe_statistics(service: Service) -> dict[str, Any]:
    """The answer; `is_counted` alone where nothing is."""
    return {"is_counted": service.deployment.observer is not None}
