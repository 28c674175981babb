"""What handlers ask for: the service, and admission.

In: a request. Out: arguments of handlers. Must never know: what an endpoint does.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from amalgam.server.service import Service


async def get_service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceArgument = Annotated[Service, Depends(get_service)]


async def admit(service: ServiceArgument) -> AsyncIterator[None]:
    """Admit the request unless the server loads or drains; a drain waits until its response has been sent."""
    with service.admit():
        yield


async def get_request_id(request: Request) -> str:
    request_id: str = request.state.request_id
    return request_id


Admission = Depends(admit)
RequestId = Annotated[str, Depends(get_request_id)]
