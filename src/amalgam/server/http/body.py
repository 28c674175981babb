"""Request bodies: their size, their JSON, and the fields that all of them share.

In: raw ASGI messages. Out: parsed bodies for the handlers. Must never know: what an endpoint does.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amalgam.base.strict_json import parse_json
from amalgam.errors import AmalgamError, OverloadedError, RequestError, describe
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.errors import BodyTooLargeError, InvalidJSONError, MediaTypeError, error_response
from amalgam.server.http.record import current_record

INLINE_BODY_BYTES = 2**14  # that the event loop parses itself: what a thread costs is more than it saves
LONG_BODY_BYTES = 2**20
MAX_JSON_KEYS = 100_000
MAX_JSON_VALUES = 2**20
MAX_HELD_BODIES = 32  # of the largest size


class Body(BaseModel):
    """Base of request bodies: a bool is not a number, an unknown field is an error, null means the default."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict) or None not in data.values():  # which is quick: a body may hold many objects
            return data
        fields = cls.model_fields
        is_absent = {key for key, value in data.items() if value is None and key in fields}
        return {key: value for key, value in data.items() if key not in is_absent or fields[key].is_required()}


def limited(max_length: int) -> BeforeValidator:
    """A mapping of at most so many entries. Pydantic would look at each of them before it counts."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > max_length:
            raise ValueError(f"At most {max_length} entries are allowed")
        return value

    return BeforeValidator(check)


class NoFields(Body):
    """A body that may be absent or `{}`."""


def parse_body(body: bytes) -> Any:
    """The JSON of a body (see `base.strict_json`), with limits on what it holds.

    Raises:
        InvalidJSONError: naming what is wrong and where.
    """
    try:
        return parse_json(body, max_keys=MAX_JSON_KEYS, max_values=MAX_JSON_VALUES)
    except ValueError as error:
        raise InvalidJSONError(f"The body is not valid JSON: {error}.", remedy="Send a JSON object.") from None


class JSONRequest(Request):
    def read_json(self, made: Callable[[Any], Any] = lambda value: value) -> None:
        """Parse the body, if there is one, which has been received. Before FastAPI does, which would hide the message
        of an error.

        Whatever is declared must be JSON, even of no length: a page of another site can send forms and plain text
        without asking first.

        Args:
            made: what `json` gives, of the body's value.

        Raises:
            MediaTypeError, InvalidJSONError: it is not JSON.
        """
        body, declared = self._body, self.headers.get("content-type")
        if body or declared is not None:
            _check_media_type(declared or "")
        if body:
            self._json = made(parse_body(body))
            self._body = b"{}"  # a long prompt is in memory for as long as its answer takes: once is enough

    async def json(self) -> Any:
        return self._json


class StrictRoute(APIRoute):
    """A route that parses its body strictly, and refuses query parameters that it does not declare or gets twice.

    What is more than a few kilobytes is parsed and validated in a thread, in turn with prompts: a megabyte of small
    objects takes half a second, in which nobody else would be answered.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            request = JSONRequest(request.scope, request.receive)
            if request.query_params and not self.dependant.query_params:
                raise RequestError(f"{self.path} takes no query.", remedy="Leave out what follows the question mark.")
            _check_no_key_twice(request)
            if self.body_field is None:
                return await handle(request)
            num_bytes = len(await request.body())
            if (record := current_record.get()) is not None:
                record.received_at = time.monotonic()
            if num_bytes <= INLINE_BODY_BYTES:
                request.read_json()
                return await handle(request)
            encoder, while_there = request.app.state.service.encoder, partial(unless_client_leaves, request.receive)
            async with contextlib.AsyncExitStack() as stack:
                if num_bytes > LONG_BODY_BYTES:
                    await stack.enter_async_context(encoder.long_body(while_there))
                await while_there(encoder.turn(lambda: request.read_json(self._validated)))
                return await handle(request)

        return handle_strictly

    def _validated(self, value: Any) -> Any:
        """The body that the handler gets: FastAPI takes it as it is.

        Raises:
            RequestValidationError: as FastAPI does.
        """
        if self.body_field is None or self._embed_body_fields:
            return value
        validated, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise RequestValidationError(errors, body=value)
        return validated


def _check_no_key_twice(request: Request) -> None:
    for key, count in Counter(key for key, _ in request.query_params.multi_items()).items():
        if count > 1:
            raise RequestError(f"{describe(key)} stands {count} times in the query.", remedy="Give it once.")


def _check_media_type(value: str) -> None:
    media_type = value.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(f"Content-Type is {media_type[:120]!a}.", remedy="Send application/json.")


class BodyTimeoutError(AmalgamError):
    """The request's body has taken longer to come than `server.body_seconds`."""

    http_status = 408
    code = "body_timeout"


class BodyLimit:
    """Refuses bodies of more than `max_bytes` before anything is parsed, too many long ones at the same time, and those
    that take longer than `max_seconds` to come; 0: they may take what they want.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_seconds: float = 0.0) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._max_held_bytes = MAX_HELD_BODIES * max_bytes
        self._held_bytes = 0  # of requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        received = 0
        is_complete = False
        deadline = time.monotonic() + self._max_seconds if self._max_seconds else None

        async def receive_within_limit() -> Message:
            nonlocal received, is_complete
            message = await (receive() if is_complete else self._receive_in_time(receive, deadline))
            is_complete = not message.get("more_body", False)
            num_bytes = len(message.get("body", b""))
            received += num_bytes
            self._held_bytes += num_bytes
            self._check(received)
            return message

        async def send_and_close(message: Message) -> None:
            """With a body that is still coming, the connection can take no other request."""
            if message["type"] == "http.response.start" and message["status"] in (408, 413) and not is_complete:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        try:
            self._check(int(declared) if declared.isdigit() else 0)
        except AmalgamError as error:
            await error_response(error)(scope, receive, send_and_close)
            return
        try:
            await self.app(scope, receive_within_limit, send_and_close)
        finally:
            self._held_bytes -= received

    async def _receive_in_time(self, receive: Receive, deadline: float | None) -> Message:
        try:
            async with asyncio.timeout_at(deadline):
                return await receive()
        except TimeoutError:
            raise BodyTimeoutError(
                f"The body has taken more than {self._max_seconds:g} s to come.", remedy="Send it faster."
            ) from None

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self.max_bytes:
            raise BodyTooLargeError(
                f"The body has more than {self.max_bytes} bytes.", remedy="Send less, or raise server.max_body_bytes."
            )
        if num_bytes and self._held_bytes > self._max_held_bytes:
            raise OverloadedError(
                f"Requests of more than {self._max_held_bytes} bytes are being answered.", remedy="Try again later."
            )
