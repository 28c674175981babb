"""What is being served: in short, for programs that ask for `/`, and all that the model says of itself."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.responses import Response

from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import Service, Status
from amalgam.version import __version__

router = APIRouter(route_class=StrictRoute, tags=["native"])


class RootAnswer(BaseModel):
    status: Status
    model: str
    version: str
    weight_version: int | None
    uptime_seconds: float


def root_answer(service: Service) -> RootAnswer:
    """What `GET /` tells programs."""
    return RootAnswer(
        status=service.status,
        model=service.model_name,
        version=__version__,
        weight_version=service.weight_version,
        uptime_seconds=service.uptime_seconds,
    )


@router.get("/model_info", response_model=dict[str, Any])
async def model_info(service: ServiceArgument) -> Response:
    """Architecture, sizes, parameters, sources, weights and bytes by precision, memory, devices."""
    return OrjsonResponse(await asyncio.to_thread(service.deployment.model_info))
