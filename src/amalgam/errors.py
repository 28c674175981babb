"""Every error a user can cause.

One base class; the HTTP status and the exit code stand on the class, so that the server and the command line
translate an error without knowing it. A message says what is wrong, names the offending value, and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class AmalgamError(Exception):
    """Base of all errors with a user-facing message.

    Args:
        what: what is wrong, naming the offending value. It may end with lines of its own.
        remedy: what the user can do about it; appended as a second sentence.
        param: the field of a request that is at fault.
        details: figures for programs, JSON; an answer has them beside the message.
    """

    http_status = 400
    exit_code = 2
    code = "invalid_request"

    def __init__(
        self, what: str, *, remedy: str = "", param: str | None = None, details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(f"{what}{remedy}" if what.endswith("\n") else f"{what} {remedy}".strip())
        self.what = what
        self.remedy = remedy
        self.param = param
        self.details = dict(details or {})


@contextmanager
def about(param: str) -> Iterator[None]:
    """What is wrong with a request inside is wrong with its field `param`, unless the error names another."""
    try:
        yield
    except (RequestError, UnsupportedError) as error:
        error.param = error.param or param
        raise


class ConfigError(AmalgamError):
    """A setting is missing, unknown or out of range."""

    code = "invalid_config"


class CheckpointError(AmalgamError):
    """A checkpoint's files are missing, damaged or unsafe."""

    http_status = 422
    exit_code = 3
    code = "invalid_checkpoint"


class UnsupportedError(AmalgamError):
    """A model family, format or option that this build does not serve."""

    http_status = 422
    exit_code = 3
    code = "unsupported"


class PlanError(AmalgamError):
    """A weight mapping that cannot be fulfilled."""

    http_status = 422
    exit_code = 4
    code = "invalid_plan"


class RequestError(AmalgamError):
    """A generation request with values out of range."""

    http_status = 422
    code = "invalid_request"


class ModelNotFoundError(RequestError):
    """Another model is asked for than the one that is served."""

    http_status = 404
    code = "model_not_found"


class VersionNotFoundError(RequestError):
    """A weight version is asked for that does not exist, or that takes no new requests."""

    http_status = 404
    code = "version_not_found"


class NotFoundError(RequestError):
    """Something is asked for by a name or id that nothing here has."""

    http_status = 404
    code = "not_found"


class PromptTooLongError(RequestError):
    """Prompt plus new tokens do not fit the model's sequence length or the KV cache."""

    http_status = 413
    code = "prompt_too_long"


class ConflictError(AmalgamError):
    """Somebody else is at work on the same thing: a change of the weights, a file."""

    http_status = 409
    exit_code = 5
    code = "conflict"


class OutOfMemoryError(AmalgamError):
    """New weights would not fit into memory; nothing has been loaded."""

    http_status = 507
    exit_code = 6
    code = "out_of_memory"


class CancelledError(ConflictError):
    """Work was given up because somebody asked for that."""


class OverloadedError(AmalgamError):
    """The waiting queue is full."""

    http_status = 503
    exit_code = 6
    code = "overloaded"
    retry_after_seconds = 1


class UnavailableError(AmalgamError):
    """The engine is loading, draining or dead."""

    http_status = 503
    exit_code = 6
    code = "unavailable"


class LostWeightsError(UnavailableError):
    """Weights that are in use are not there any more; nothing can be computed with them."""

    code = "weights_lost"


class ReplicaLostError(UnavailableError):
    """The replica that worked on a request has gone, and the request cannot be begun anew on another one."""

    code = "replica_lost"


def describe(value: Any, limit: int = 120) -> str:
    """`repr` of a user's value, shortened and safe to print on one line."""
    text = repr(value)
    if len(text) <= limit:
        return text
    num_characters = len(value) if isinstance(value, str) else len(text)  # of a string without its quotes
    return f"{text[:limit]}… ({num_characters} characters)"
