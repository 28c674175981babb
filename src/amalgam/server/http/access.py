"""A record and a log line for each request, and clients that leave.

In: ASGI messages. Out: log lines, 500 for unexpected errors, cancellation. Must never know: what an endpoint does.
Middleware is plain ASGI, because wrapping responses slows event streams several times over.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import re
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
from amalgam.server.http.record import RequestRecord, current_record
from amalgam.server.http.shapes import id_headers

CLIENT_LEFT = 499  # nginx's status for a request whose client closed the connection
MAX_PATH_CHARS = 200
PROBES = ("/health", "/v1/health", "/ping", "/ready", "/metrics")  # which machines ask every few seconds
VERSION_HEADER = b"x-amalgam-weight-version"
SESSION_HEADER = b"x-amalgam-session"  # what a client calls requests that belong together
MAX_SESSION_CHARS = 256
NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
SHORTAGE_SECONDS = 60
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NUM_IN_ORDER = 5  # fields of a line that stand in it without their names

logger = logging.getLogger("amalgam.server")
T = TypeVar("T")


class AccessLog:
    """Gives each request an id, a record and one log line, and turns unexpected errors into 500.

    The id is the client's `X-Request-ID` where it is made of harmless characters. The line holds neither query nor
    body, for those may hold prompts and keys; prompts are in the record if they are wanted in the log.

    Args:
        count_refusal: takes the code of each answer that is an error, or a stream that ends with one; not of those to
            probes, which ask all the time.
        export: takes the record of each request at its end; not of probes.
        logs_probes: whether probes have their lines.
        request_seconds: how long a request may take; 0: as long as it wants.
    """

    def __init__(
        self,
        app: ASGIApp,
        count_refusal: Callable[[str], None],
        export: Callable[[RequestRecord], None] | None = None,
        *,
        logs_probes: bool = True,
        request_seconds: float = 0.0,
    ) -> None:
        self.app = app
        self._count_refusal = count_refusal
        self._export = export
        self._logs_probes = logs_probes
        self._request_seconds = request_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = self._new_record(scope)
        scope.setdefault("state", {}).update(request_id=record.request_id, record=record)
        current_record.set(record)  # in the context of this request's task alone

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                ids = [(name, record.request_id.encode()) for name in id_headers(scope)]
                message["headers"] = [*message.get("headers", ()), *ids]
                if record.weight_version is not None:
                    message["headers"].append((VERSION_HEADER, str(record.weight_version).encode()))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientDisconnect:
            record.status = CLIENT_LEFT
        except Exception as error:
            if (shortage := as_shortage(error)) is not None:
                error = shortage
            else:
                log_unexpected(error, record.request_id)
            if record.status == 0:
                await error_response(error, record.request_id)(scope, receive, send_with_id)
        finally:
            record.weights = None  # an idle connection keeps the record of its last request
            record.seconds = time.monotonic() - record.started_at
            record.route = getattr(scope.get("route"), "path", "")
            record.error = scope["state"].get("refusal", "")
            self._end(record)

    def _new_record(self, scope: Scope) -> RequestRecord:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", "")
        record = RequestRecord(
            request_id=given if _REQUEST_ID.fullmatch(given) else new_request_id(),
            method=scope["method"],
            path=scope["path"],
            traceparent=headers.get(b"traceparent", ""),
            tracestate=headers.get(b"tracestate", ""),
            session=headers.get(SESSION_HEADER, "")[:MAX_SESSION_CHARS],
        )
        if self._request_seconds:
            record.deadline = record.started_at + self._request_seconds
        return record

    def _end(self, record: RequestRecord) -> None:
        is_probe = record.path in PROBES
        if not is_probe and record.error:
            self._count_refusal(record.error)
        if self._logs_probes or not is_probe:
            log_request(record)
        if self._export is not None and not is_probe:
            self._export(record)


def new_request_id() -> str:
    return secrets.token_hex(6)


def log_request(record: RequestRecord) -> None:
    """The request's line in the log."""
    fields = log_fields(record)
    path, milliseconds = one_line(record.path[:MAX_PATH_CHARS]), record.seconds * 1e3
    more = "".join(f" {name}={_written(value)}" for name, value in list(fields.items())[_NUM_IN_ORDER:])
    logger.info(
        "%s %s %d %.1f ms %s%s", record.method, path, record.status, milliseconds, record.request_id, more,
        extra={"fields": fields},
    )  # fmt: skip


def log_fields(record: RequestRecord) -> dict[str, Any]:
    """What the log says of a request. The first `_NUM_IN_ORDER` are always there; of the others, those that it has."""
    fields: dict[str, Any] = {
        "request_id": record.request_id,
        "method": record.method,
        "path": record.path[:MAX_PATH_CHARS],
        "status": record.status,
        "seconds": round(record.seconds, 6),
    }
    if record.caller:
        fields["key"] = record.caller
    if record.num_prompt_tokens:
        fields |= {"prompt_tokens": record.num_prompt_tokens, "generated_tokens": record.num_new_tokens}
    if record.num_cached_tokens:
        fields["cached_tokens"] = record.num_cached_tokens
    if record.first_token_seconds is not None:
        fields["first_token_seconds"] = round(record.first_token_seconds, 6)
    if record.finish_reasons:
        fields["finish_reason"] = ",".join(sorted(set(record.finish_reasons)))
    if record.error:
        fields["error"] = record.error
    if record.weight_version is not None:
        fields["weight_version"] = record.weight_version
    if record.prompts:
        fields["prompts"] = record.prompts
    return fields


def _written(value: Any) -> str:
    return one_line(repr(value)) if isinstance(value, list) else str(value)


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
