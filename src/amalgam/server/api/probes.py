"""What machines ask every few seconds: whether the server lives, whether it takes requests, and its figures."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from amalgam.errors import UnavailableError
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.errors import error_response
from amalgam.server.service import Status

router = APIRouter(tags=["operation"])  # not strict: whoever probes may add a query


class StatusAnswer(BaseModel):
    status: Status


@router.get("/health", response_model=StatusAnswer)
@router.get("/v1/health", response_model=StatusAnswer, include_in_schema=False)  # llama-server's
@router.api_route("/ping", methods=["GET", "POST"], response_model=StatusAnswer, include_in_schema=False)  # vLLM's
async def health(service: ServiceArgument) -> StatusAnswer | Response:
    """Alive, which includes loading and draining; 503 once the model could not be loaded or the engine has died."""
    if service.failure is not None:
        return error_response(UnavailableError("The server has failed.", remedy="Its log has the cause."))
    return StatusAnswer(status=service.status)


@router.get("/ready", response_model=StatusAnswer)
async def ready(service: ServiceArgument) -> StatusAnswer:
    """Whether requests are taken; 503 while the server loads or drains."""
    service.check_ready()
    return StatusAnswer(status=service.status)


@router.get("/metrics", response_class=Response)
async def metrics(service: ServiceArgument, request: Request) -> Response:
    """Figures for Prometheus."""

    def render() -> tuple[bytes, str]:
        from amalgam.server.metrics import render_metrics

        return render_metrics(service, request.headers.get("accept", ""))

    content, media_type = await asyncio.to_thread(render)
    return Response(content, media_type=media_type)
