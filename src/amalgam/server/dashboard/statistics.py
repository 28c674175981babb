"""What the page must know of the expert statistics before it asks for any.

In: the service. Out: whether anything is counted, and what may be asked for. That nothing is counted is an answer here,
not an error.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from fastapi import APIRouter
from starlette.responses import Response

from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import Service

if TYPE_CHECKING:
    from amalgam.experts.tracker import ExpertTracker

MINUTES = (1, 5, 15, 60, 6 * 60, 24 * 60)

router = APIRouter(route_class=StrictRoute, include_in_schema=False)


@router.get("/dashboard/statistics")
async def statistics(service: ServiceArgument) -> Response:
    """Whether the use of experts is counted, and over which times."""
    return OrjsonResponse(await asyncio.to_thread(describe_statistics, service))


def describe_statistics(service: Service) -> dict[str, Any]:
    """The answer; `is_counted` alone where nothing is. `windows` are minutes, the last of them all that is kept;
    `hot_from` and `cold_to`, in even shares, are those of the hints.
    """
    if service.deployment.observer is None:
        return {"is_counted": False}
    from amalgam.experts.hints import COLD
    from amalgam.experts.overview import drift_minutes, drift_sides
    from amalgam.experts.statistics import HOT

    settings = cast("ExpertTracker", service.deployment.observer).settings
    kept = settings.history_minutes
    return {
        "is_counted": True,
        "windows": sorted({minutes for minutes in MINUTES if minutes < kept} | {drift_minutes(settings), kept}),
        "drift": drift_sides(settings),
        "half_life_minutes": settings.half_life_minutes,
        "has_reference": bool(settings.reference),
        "hot_from": HOT,
        "cold_to": COLD,
    }
