"""Server-sent events: a response that is written as its events come.

In: an iterator of encoded events. Out: ASGI messages, until the events end or the client leaves. Must never know: what
is in them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from amalgam.errors import AmalgamError
from amalgam.server.http.access import log_unexpected, unless_client_leaves
from amalgam.server.http.errors import refusal_of

COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def event(fields: dict[str, Any], name: str = "") -> bytes:
    """One event: a `data:` line of JSON, after an `event:` line if it has a name."""
    data = orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY)
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data) if name else b"data: %b\n\n" % data


class Closable(Protocol):
    async def aclose(self) -> None: ...


class EventStream(Response):
    """Server-sent events, ended with `end` whatever happens.

    Headers leave at once, and while there is nothing to tell a comment every few seconds: proxies end connections on
    which nothing moves. Browsers and clients of server-sent events pass over comments.

    Args:
        outputs: where `events` come from; closed when the stream ends, also when the client leaves.
        events: encoded, see `event`.
        describe_error: an error that `events` raised → the event that tells of it.
        request_id: named in the log of an unexpected failure.
        comment_seconds: how long nothing may be sent; 0: for ever.
        comment: what is sent then.
        end: the last bytes.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        outputs: Closable,
        events: AsyncGenerator[bytes],
        describe_error: Callable[[Exception], bytes],
        request_id: str,
        comment_seconds: float,
        *,
        comment: bytes = COMMENT,
        end: bytes = DONE,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._outputs = outputs
        self._events = events
        self._describe_error = describe_error
        self._request_id = request_id
        self._comment_seconds = comment_seconds
        self._comment = comment
        self._end = end
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A generator that was never begun ends nothing: what it reads is closed too.
        async with aclosing(self._outputs), aclosing(self._events):
            await unless_client_leaves(receive, self._send_events(scope, send))

    async def _send_events(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        comments = asyncio.create_task(self._send_comments(send)) if self._comment_seconds else None
        try:
            async for encoded in self._events:
                await self._send(send, encoded)
        except Exception as error:
            if not isinstance(error, AmalgamError):
                log_unexpected(error, self._request_id)
            scope["state"]["refusal"] = refusal_of(error).code  # though its status has left
            await self._send(send, self._describe_error(error))
        finally:
            if comments is not None:
                comments.cancel()
                await asyncio.gather(comments, return_exceptions=True)
        await send({"type": "http.response.body", "body": self._end, "more_body": False})

    async def _send(self, send: Send, encoded: bytes) -> None:
        self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": encoded, "more_body": True})

    async def _send_comments(self, send: Send) -> None:
        """Beside the events, which thus need no timer each. The server writes a message as a whole."""
        self._sent_at = time.monotonic()
        while True:
            idle = time.monotonic() - self._sent_at
            if idle >= self._comment_seconds:
                self._sent_at = time.monotonic()
                await send({"type": "http.response.body", "body": self._comment, "more_body": True})
                idle = 0.0
            await asyncio.sleep(self._comment_seconds - idle)
