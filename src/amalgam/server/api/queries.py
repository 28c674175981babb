"""What requests for expert statistics have in common: windows of time, and answers that many viewers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ConfigDict, Field
from starlette.responses import Response

from amalgam.server.http.body import Body
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.service import Service


class WindowBody(Body):
    minutes: float | None = Field(default=None, gt=0)
    """Count the last minutes only; null: since the last reset."""


class WindowQuery(WindowBody):
    model_config = ConfigDict(strict=False)  # a query holds nothing but strings


class SharedQuery(Body):
    model_config = ConfigDict(strict=False)

    statistics_version: int | None = Field(default=None, ge=0)
    """As the dashboard's events tell it: an answer of this version or later will do, even if it was made for somebody
    else in the last two seconds. null: it is made now."""


class SharedWindowQuery(WindowQuery, SharedQuery):
    pass


async def share(service: Service, name: str, query: SharedQuery, work: Callable[[], dict[str, Any]]) -> Response:
    """What `work` gives, called in a thread unless somebody else's answer to the same query will do."""
    statistics = service.deployment.statistics
    revision = 0 if statistics is None else statistics.revision
    key = (name, service.weight_version, query.model_copy(update={"statistics_version": None}))

    def make() -> bytes:
        return bytes(OrjsonResponse(work()).body)

    content = await service.shared_answers.get(key, query.statistics_version, revision, make)
    return Response(content, media_type=OrjsonResponse.media_type)
