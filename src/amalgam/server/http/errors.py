"""Errors → HTTP answers, in the shape of the interface that was asked (`shapes`).

In: anything a handler raises. Out: a response whose body can always be serialised, whatever the client sent.
"""

from __future__ import annotations

import http
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import Receive, Scope, Send

from amalgam.base.validation import expectation
from amalgam.errors import AmalgamError, describe
from amalgam.server.http.methods import without_slash
from amalgam.server.http.shapes import Refusal, Shape, native, shape_for

RETRY_AFTER_SECONDS = 5
MAX_REPORTED_ERRORS = 3
MAX_COMPARED_ERRORS = 32
MAX_NAME_CHARS = 120


class BodyTooLargeError(AmalgamError):
    """The request's body exceeds `server.max_body_bytes`."""

    http_status = 413
    code = "body_too_large"


class MediaTypeError(AmalgamError):
    """The request's body is declared to be something else than JSON."""

    http_status = 415
    code = "unsupported_media_type"


class InvalidJSONError(AmalgamError):
    """The request's body is not JSON as RFC 8259 has it."""

    code = "invalid_json"


class ErrorDetail(BaseModel):
    type: str
    message: str
    param: str | None = None
    change: dict[str, Any] | None = None
    """The change of the weights that is under way, of an answer 409 to another one."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorAnswer(BaseModel):
    """The body of every answer with a status of 400 or more."""

    error: ErrorDetail


class OrjsonResponse(JSONResponse):
    """JSON through orjson: never emits NaN, and takes integers as keys and arrays as lists."""

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY)


class ErrorResponse(OrjsonResponse):
    """An error's answer, which leaves its code in the request's state: refusals are counted by it."""

    def __init__(self, refusal: Refusal, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(native(refusal)[1], refusal.status, headers)
        self._refusal = refusal
        self._given_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})
        state["refusal"] = self._refusal.code
        refusal = replace(self._refusal, request_id=self._refusal.request_id or state.get("request_id", ""))
        status, content = shape_for(scope)(refusal)
        await OrjsonResponse(content, status, self._given_headers)(scope, receive, send)


def refusal_of(error: Exception, request_id: str = "") -> Refusal:
    """What a client is told of `error`. Of unexpected errors it is told only the request's id."""
    if not isinstance(error, AmalgamError):
        message = f"The server failed on this request (id {request_id}). Its log has a line with that id."
        return Refusal(500, "internal_error", message, request_id=request_id)
    notes = [f"{note.removesuffix('.')}." for note in getattr(error, "__notes__", ())]
    message = " ".join([f"{str(error).removesuffix('.')}.", *notes]) if notes else str(error)
    return Refusal(error.http_status, error.code, message, error.param, request_id=request_id, details=error.details)


def error_content(error: Exception, request_id: str = "", shape: Shape = native) -> dict[str, Any]:
    """The JSON body that tells a client of `error`."""
    return shape(refusal_of(error, request_id))[1]


def error_response(error: Exception, request_id: str = "") -> ErrorResponse:
    """The answer that tells a client of `error`."""
    refusal = refusal_of(error, request_id)
    headers = {}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refusal.status in (429, 503):
        headers["Retry-After"] = str(getattr(error, "retry_after_seconds", RETRY_AFTER_SECONDS))
    return ErrorResponse(refusal, headers)


def register_error_handlers(app: FastAPI, pages: AbstractSet[str]) -> None:
    """Answer user errors, refused bodies, unknown paths and wrong methods in the shape of the interface.

    Args:
        pages: paths that a slash behind them leads to.
    """

    async def on_amalgam_error(request: Request, error: Exception) -> OrjsonResponse:
        return error_response(error)

    async def on_validation_error(request: Request, error: Exception) -> OrjsonResponse:
        assert isinstance(error, RequestValidationError)
        items = _without_other_kinds(error.errors(), error.body)
        names = _field_names(request)
        messages = [_explain(item, error.body, names) for item in items[:MAX_REPORTED_ERRORS]]
        if len(items) > MAX_REPORTED_ERRORS:
            messages.append(f"{len(items) - MAX_REPORTED_ERRORS} more errors.")
        cause = str(items[0]["type"])
        return ErrorResponse(
            Refusal(422, "invalid_request", " ".join(messages), _parameter(items[0], error.body), cause)
        )

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        where = describe(request.url.path, MAX_NAME_CHARS)
        if error.status_code == 404 and (place := without_slash(pages, request.scope)) is not None:
            return RedirectResponse(place, 308)
        if error.status_code == 404:
            message = f"There is no {where} here. GET /docs lists the endpoints."
        elif error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            message = f"{request.method[:MAX_NAME_CHARS]!a} is not a method of {where}. Allowed: {allowed}."
        else:
            message = str(error.detail)
        kind = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        return ErrorResponse(Refusal(error.status_code, kind, message), error.headers)

    app.add_exception_handler(AmalgamError, on_amalgam_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)


def _parameter(item: Mapping[str, Any], body: Any) -> str:
    """`("body", "prompts", 3)` → `prompts[3]`. What pydantic adds, the tag or type of one of several, is left out.

    Args:
        body: of the request; None: there is none.
    """
    where, *path = item["loc"]
    if where != "body" or body is None:
        return _written(path)
    _, _, steps = _found(path, body, item)
    return _written(steps) or "body"


def _found(path: Sequence[str | int], value: Any, item: Mapping[str, Any]) -> tuple[bool, int, list[str | int]]:
    """The steps of `path` that lead into `value`, after whether they end at the item's value, and their number.

    A tag may be spelt as a key that is there, so that both are tried: the reading that ends at the right place counts.
    """
    if not path:
        is_end = item["type"] != "missing" and (value is item["input"] or value == item["input"])
        return is_end, 0, []
    first, rest = path[0], path[1:]
    readings = [_found(rest, value, item)]
    is_key = isinstance(value, dict) and first in value
    if is_key or (isinstance(value, list) and isinstance(first, int) and first < len(value)):
        is_end, num_steps, steps = _found(rest, value[first], item)
        readings.append((is_end, num_steps + 1, [first, *steps]))
    elif item["type"] == "missing" and not rest and isinstance(value, dict):
        readings.append((True, 1, [first]))
    return max(readings, key=lambda reading: reading[:2])


def _written(steps: Sequence[str | int]) -> str:
    name = ""
    for step in steps:
        name += f"[{step}]" if isinstance(step, int) else f"{'.' if name else ''}{step}"
    return name[:MAX_NAME_CHARS]


def _without_other_kinds(items: Sequence[Mapping[str, Any]], body: Any) -> list[Mapping[str, Any]]:
    """Where a value may be of several kinds, and is of one: what is wrong within it, and not that it is none of the
    others, which comes close to it.
    """
    names = [_parameter(item, body) for item in items[:MAX_COMPARED_ERRORS]]

    def is_other_kind(index: int) -> bool:
        within = (f"{names[index]}.", f"{names[index]}[")
        return items[index]["type"].endswith("_type") and any(name.startswith(within) for name in names)

    return [item for index, item in enumerate(items) if index >= len(names) or not is_other_kind(index)]


def _field_names(request: Request) -> list[str]:
    """What the body and the query of the route that was asked may hold, on their top level."""
    route = request.scope.get("route")
    body, dependant = getattr(route, "body_field", None), getattr(route, "dependant", None)
    declared = [*([body] if body is not None else []), *getattr(dependant, "query_params", ())]
    names: list[str] = []
    for field in declared:
        kind = field.field_info.annotation
        is_model = isinstance(kind, type) and issubclass(kind, BaseModel)
        names += kind.model_fields if is_model else [field.alias]
    return names


def _explain(item: Mapping[str, Any], body: Any, names: Sequence[str]) -> str:
    """
    Args:
        names: fields that the request may have on its top level, one of which a misspelt one may have meant.
    """
    param = _parameter(item, body)
    if item["type"] == "missing":
        return f"{param} is required."
    if item["type"] == "extra_forbidden":
        is_comparable = len(item["loc"]) == 2 and len(param) < MAX_NAME_CHARS
        close = get_close_matches(param, names, n=1) if is_comparable else []
        remedy = f"Did you mean {close[0]!r}?" if close else "Remove it or correct its name;"
        return f"{describe(param)} is not a field of this request. {remedy} /docs lists the fields."
    return f"{param} is {_show(item['input'])}. {expectation(item)}"


def _show(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > 8:
        return f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)} items"
    if value is None or isinstance(value, bool):
        return json.dumps(value)  # as the client wrote it: null, true, false
    return describe(value)
