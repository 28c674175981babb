"""The shapes of an error's answer: each interface has its own, told by the path.

In: what is wrong. Out: a status and a JSON body. Must never know: exceptions, endpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

OPENAI_PATHS = ("/v1", "/models", "/chat/completions", "/tokenize", "/detokenize")  # and what is below them
ANTHROPIC_PATHS = ("/v1/messages",)
OVERLOADED_STATUS = 529  # Anthropic's own


@dataclass(frozen=True)
class Refusal:
    """An error as a client is told of it.

    Attributes:
        code: what kind of error; see `AmalgamError.code`.
        param: the field that it is about.
        cause: what is wrong with the field: a type of pydantic's errors.
        details: what the shapes of this server and of Anthropic have beside the message.
    """

    status: int
    code: str
    message: str
    param: str | None = None
    cause: str = ""
    request_id: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


Shape = Callable[[Refusal], tuple[int, dict[str, Any]]]  # the status may be another one


def shape_for(scope: Scope) -> Shape:
    """The shape of the interface that a request is for."""
    path: str = scope.get("path", "").removeprefix(scope.get("root_path", ""))
    if _is_at(path, ANTHROPIC_PATHS):
        return anthropic
    return openai if _is_at(path, OPENAI_PATHS) else native


def id_headers(scope: Scope) -> tuple[bytes, ...]:
    """The headers that tell a client of its request's id; Anthropic's own client reads one of another name."""
    return (b"x-request-id", b"request-id") if shape_for(scope) is anthropic else (b"x-request-id",)


def _is_at(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def native(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    """`{"error": {"type", "message", "param"?, …}}`, with the details of the error."""
    error: dict[str, Any] = {"type": refusal.code, "message": refusal.message, **refusal.details}
    if refusal.param is not None:
        error["param"] = refusal.param
    return refusal.status, {"error": error}


def openai(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    """`{"error": {"message", "type", "param", "code"}}`; what is wrong with a request is 400, as OpenAI has it."""
    status = 400 if refusal.status == 422 or refusal.code == "prompt_too_long" else refusal.status
    kind = "server_error" if status >= 500 else "invalid_request_error"
    if status == 429:
        kind = "tokens" if "token" in refusal.code else "requests"
    code = {
        "prompt_too_long": "context_length_exceeded",
        "unauthorized": "invalid_api_key",
        "rate_limited": "rate_limit_exceeded",
        "token_rate_limited": "rate_limit_exceeded",
        "unsupported": "unsupported_parameter",
        "content_filtered": "content_filter",
    }.get(refusal.code, refusal.code)
    if status == 401:
        code = "invalid_api_key"
    if code == "invalid_request":
        code = _code_of_field(refusal)
    return status, {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": code or None}}


def _code_of_field(refusal: Refusal) -> str:
    if refusal.cause == "missing":
        return "missing_required_parameter"
    if refusal.cause == "extra_forbidden":
        return "unknown_parameter"
    if refusal.cause.endswith("_type"):
        return "invalid_type"
    return "" if refusal.param is None else "invalid_value"


def anthropic(refusal: Refusal) -> tuple[int, dict[str, Any]]:
    """`{"type": "error", "error": {"type", "message", "details"?}, "request_id"}`."""
    status = 400 if refusal.status in (409, 415, 422) or refusal.code == "prompt_too_long" else refusal.status
    if refusal.code == "overloaded":
        status = OVERLOADED_STATUS
    kind = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        OVERLOADED_STATUS: "overloaded_error",
    }.get(status, "api_error" if status >= 500 else "invalid_request_error")
    message, param = refusal.message, refusal.param
    if param is not None and param not in message:  # which has no place of its own
        message = f"{param}: {message}"
    error: dict[str, Any] = {"type": kind, "message": message}
    if refusal.details:
        error["details"] = refusal.details
    return status, {"type": "error", "error": error, "request_id": refusal.request_id or None}
