"""Request bodies: their size, their JSON, and the fields that all of them share.

In: raw ASGI messages. Out: parsed bodies for the handlers. Must never know: what an endpoint does.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amalgam.errors import RequestError, describe
from amalgam.server.errors import BodyTooLargeError, InvalidJSONError, MediaTypeError, error_response

MAX_JSON_KEYS = 100_000


class Body(BaseModel):
    """Base of request bodies: a bool is not a number, an unknown field is an error."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


class NoFields(Body):
    """A body that may be absent or `{}`."""


def parse_json(body: bytes) -> Any:
    """Parse RFC 8259 JSON: no NaN, no infinities, no lone surrogates, no key twice, bounded depth and keys.

    Raises:
        InvalidJSONError: naming what is wrong and where.
    """
    try:
        value = orjson.loads(body)
        json.loads(body, object_pairs_hook=_KeyCheck())
    except (ValueError, RecursionError) as error:
        raise InvalidJSONError(f"The body is not valid JSON: {error}.", remedy="Send a JSON object.") from None
    return value


class _KeyCheck:
    """`object_pairs_hook` that refuses repeated keys, which parsers otherwise drop silently, and too many of them."""

    def __init__(self) -> None:
        self.num_keys = 0

    def __call__(self, pairs: list[tuple[str, Any]]) -> None:
        self.num_keys += len(pairs) + 1
        if self.num_keys > MAX_JSON_KEYS:
            raise ValueError(f"more than {MAX_JSON_KEYS} keys")
        keys = set()
        for key, _ in pairs:
            if key in keys:
                raise ValueError(f"key {key[:64]!a} stands twice")
            keys.add(key)


class JSONRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = parse_json(await self.body())
        return self._json


class StrictRoute(APIRoute):
    """A route that parses its body strictly, and refuses query parameters that it does not declare or gets twice."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            request = JSONRequest(request.scope, request.receive)
            if request.query_params and not self.dependant.query_params:
                raise RequestError(f"{self.path} takes no query.", remedy="Leave out what follows the question mark.")
            _check_no_key_twice(request)
            if self.body_field is not None and await request.body():
                _check_media_type(request.headers.get("content-type", ""))
                await request.json()  # here, since FastAPI would hide the message of an error raised further in
            return await handle(request)

        return handle_strictly


def _check_no_key_twice(request: Request) -> None:
    for key, count in Counter(key for key, _ in request.query_params.multi_items()).items():
        if count > 1:
            raise RequestError(f"{describe(key)} stands {count} times in the query.", remedy="Give it once.")


def _check_media_type(value: str) -> None:
    media_type = value.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(f"Content-Type is {media_type[:120]!a}.", remedy="Send application/json.")


class BodyLimit:
    """Refuses bodies of more than `max_bytes` before anything is parsed."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        error = BodyTooLargeError(
            f"The body has more than {self.max_bytes} bytes.", remedy="Send less, or raise server.max_body_bytes."
        )
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.max_bytes:
            await error_response(error)(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise error
            return message

        await self.app(scope, receive_within_limit, send)
