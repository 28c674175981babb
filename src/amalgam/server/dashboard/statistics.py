"""What the page must know of the expert statistics before it asks for any.

In: the service. Out: whether anything is counted, and what may be asked for. That nothing is counted is an answer here,
not an error.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import Service

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


@router.get("/dashboard/statistics")
async def statistics(service: ServiceArgument) -> Response:
    """Whether the use of experts is counted, and over which times."""
    return OrjsonResponse(await asyncio.to_thread(describe_statistics, service))


def describe_statistics(service: Service) -> dict[str, Any]:
    """The answer; `is_counted` alone where nothing is."""
    statistics = service.deployment.statistics
    return {"is_counted": False} if statistics is None else {"is_counted": True, **statistics.describe()}
