"""Refuses requests for which the queue has no place, before anything of them is read.

In: requests that would take a place, as `KeyGuard` notes. Out: 503 with `Retry-After`. Must never know: what an
endpoint does, nor what a queue is.

The endpoints ask again when they know what is wanted. Here it costs less than half as much: neither the body nor its
fields have been looked at, and an overload is when that counts.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from amalgam.errors import AmalgamError
from amalgam.server.http.errors import error_response


class QueueGuard:
    """
    Args:
        check_room: raises an AmalgamError where there is no place.
    """

    def __init__(self, app: ASGIApp, check_room: Callable[[], None]) -> None:
        self.app = app
        self._check_room = check_room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["state"]["takes_place"]:
            try:
                self._check_room()
            except AmalgamError as error:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
