"""Plans that follow the traffic: what was decided and why, a switch that freezes them, an expert's precision explained.

In: a switch, an expert. Out: figures. What is proposed and taken is decided in `amalgam.runtime.autoplan`.
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field
from starlette.responses import Response

from amalgam.errors import UnsupportedError
from amalgam.server.dependencies import ServiceArgument
from amalgam.server.http.body import Body, StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.interface import Autoplan
from amalgam.server.service import Service

router = APIRouter(route_class=StrictRoute, tags=["weights"])


class AutoplanBody(Body):
    frozen: bool
    """true: weights stay as they are; plans are proposed and told all the same."""


class ExplainQuery(Body):
    model_config = ConfigDict(strict=False)  # a query holds nothing but strings

    layer: int = Field(ge=0)
    """A decoder layer that has experts."""
    expert: int = Field(ge=0)


@router.get("/autoplan", response_model=dict[str, Any])
async def get_autoplan(service: ServiceArgument) -> Response:
    """What was decided, with its figures, and the drift of the experts' use; `enabled` says whether there is any."""
    return await asyncio.to_thread(lambda: OrjsonResponse(_described(service.deployment.autoplan)))


@router.post("/autoplan", response_model=dict[str, Any])
async def set_autoplan(body: AutoplanBody, service: ServiceArgument) -> Response:
    """Freeze the plan in force, or let it follow the traffic again. Answers as `GET /autoplan`."""
    autoplan = autoplan_of(service)
    autoplan.set_frozen(body.frozen)
    return await asyncio.to_thread(lambda: OrjsonResponse(_described(autoplan)))


@router.get("/explain", response_model=dict[str, Any])
async def explain(service: ServiceArgument, query: Annotated[ExplainQuery, Query()]) -> Response:
    """Why an expert has its precision: its use, what each precision is expected to cost in divergence and bytes."""
    make = autoplan_of(service).explain
    return await asyncio.to_thread(lambda: OrjsonResponse(make(query.layer, query.expert)))


def autoplan_of(service: Service) -> Autoplan:
    """
    Raises:
        UnsupportedError: plans do not follow the traffic here.
    """
    autoplan = service.deployment.autoplan
    if autoplan is None:
        raise UnsupportedError(
            "Plans do not follow the traffic here.",
            remedy="Start the server with --autoplan, once sensitivities are measured (docs/planning.md).",
        )
    return autoplan


def _described(autoplan: Autoplan | None) -> dict[str, Any]:
    return {"enabled": False} if autoplan is None else {"enabled": True, **autoplan.describe()}
