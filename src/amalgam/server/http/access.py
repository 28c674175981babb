"""One log line per request, and clients that leave.

In: ASGI messages. Out: log lines, 500 for unexpected errors, cancellation. Must never know: what an endpoint does.
Middleware is plain ASGI, because wrapping responses slows event streams several times over.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import secrets
import time
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amalgam.base.escaping import one_line
from amalgam.errors import UnavailableError
from amalgam.server.http.errors import error_response

CLIENT_LEFT = 499  # nginx's status for a request whose client closed the connection
MAX_PATH_CHARS = 200
PROBES = ("/health", "/ready", "/metrics")  # which machines ask every few seconds
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
SHORTAGE_SECONDS = 60

logger = logging.getLogger("amalgam.server")
T = TypeVar("T")


class AccessLog:
    """Gives each request an id and one log line, and turns unexpected errors into 500.

    The line holds neither query nor body, for those may hold prompts and keys.

    Args:
        count_refusal: takes the code of each answer that is an error; not of those to probes, which ask all the time.
        logs_probes: whether probes have their lines.
    """

    def __init__(self, app: ASGIApp, count_refusal: Callable[[str], None], *, logs_probes: bool = True) -> None:
        self.app = app
        self._count_refusal = count_refusal
        self._logs_probes = logs_probes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        request_id = scope.setdefault("state", {})["request_id"] = secrets.token_hex(6)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = CLIENT_LEFT
        except Exception as error:
            if (shortage := as_shortage(error)) is not None:
                error = shortage
            else:
                log_unexpected(error, request_id)
            if status == 0:
                await error_response(error, request_id)(scope, receive, send_with_id)
        finally:
            is_probe = scope["path"] in PROBES
            if not is_probe and (code := scope["state"].get("refusal")) is not None:
                self._count_refusal(code)
            if self._logs_probes or not is_probe:
                path = one_line(scope["path"][:MAX_PATH_CHARS])
                milliseconds = (time.perf_counter() - started) * 1e3
                logger.info("%s %s %d %.1f ms %s", scope["method"], path, status, milliseconds, request_id)


def as_shortage(error: Exception) -> UnavailableError | None:
    """What to tell a client where the process has no file descriptors left; said in the log once in a while."""
    if not isinstance(error, OSError) or error.errno not in NO_DESCRIPTORS:
        return None
    shortage_log.warn("a request", error)
    return UnavailableError("The server has no file descriptors left.", remedy="Try again later.")


class ShortageLog:
    """Says that the system gives no more connections or files, once in `SHORTAGE_SECONDS`: a full log helps nobody."""

    def __init__(self) -> None:
        self.said_at = -math.inf

    def warn(self, what: str, error: OSError) -> None:
        """`error` kept `what` from being served."""
        now = time.monotonic()
        if now - self.said_at < SHORTAGE_SECONDS:
            return
        self.said_at = now
        logger.error(
            "no resources for %s: %s. Connections wait, streams go on. At most %d file descriptors: raise the limit "
            "(ulimit -n, LimitNOFILE), or lower server.keep_alive_seconds. Not said again for %d s.",
            what, error.strerror, resource.getrlimit(resource.RLIMIT_NOFILE)[0], SHORTAGE_SECONDS,
        )  # fmt: skip


shortage_log = ShortageLog()


def log_unexpected(error: Exception, request_id: str) -> None:
    """One line without the error's message, which may quote a prompt; the whole trace at level DEBUG."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames))
    logger.error("internal error %s %s at %s", request_id, type(error).__name__, where)
    logger.debug("internal error %s", request_id, exc_info=error)


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it as soon as the client closes the connection.

    Only for requests whose body has been read. ASGI servers do not cancel handlers by themselves.

    Raises:
        ClientDisconnect: the client has left.
    """
    task = asyncio.ensure_future(work)
    departure = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        departure.cancel()
        await asyncio.gather(task, departure, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
