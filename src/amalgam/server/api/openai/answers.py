"""What answers of all endpoints have in common: ids, usage, the weight version, how they end.

In: figures of finished requests. Out: JSON. Must never know: requests, text.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field
from typing import Any

from amalgam.engine.request import FinishReason, Usage
from amalgam.server.events import Closable, EventStream, event
from amalgam.server.http.errors import error_content
from amalgam.server.http.shapes import openai
from amalgam.server.service import Service
from amalgam.version import __version__


@dataclass(frozen=True)
class Head:
    """The fields that an answer and each chunk of its stream begin with."""

    kind: str  # `chat.completion.chunk`
    prefix: str  # of the id
    model: str
    version: int  # the weight version that answers
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.prefix}-{secrets.token_hex(16)}")

    def fields(self, version: int | None = None) -> dict[str, Any]:
        """
        Args:
            version: the weight version that answered, where it is known.
        """
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": fingerprint(self.version if version is None else version),
        }


def fingerprint(version: int) -> str:
    """Names the program and the weight version: with both the same, a seed gives the same answer."""
    return f"amalgam-{__version__}-weights-{version}"


def reason_of(reason: FinishReason | None) -> str:
    """A finish reason in OpenAI's words."""
    return reason.value if reason in (FinishReason.LENGTH, FinishReason.CONTENT_FILTER) else "stop"


@dataclass
class TokenCounts:
    """Tokens of one request and all its choices so far."""

    num_prompt_tokens: int
    num_new_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0

    def finish(self, usage: Usage, *, is_first_sample: bool) -> None:
        """A choice is at its end. Samples of one prompt share it, so that only the first one's cache hits count."""
        if is_first_sample:
            self.num_cached_tokens += usage.num_cached_tokens

    def shape(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_new_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.num_reasoning_tokens},
        }


def error_fields(error: Exception, request_id: str) -> dict[str, Any]:
    """The error event of a stream."""
    return error_content(error, request_id, openai)


def stream_of(service: Service, choices: Closable, events: AsyncGenerator[bytes], request_id: str) -> EventStream:
    """What a client gets that asked for a stream."""

    def describe_error(error: Exception) -> bytes:
        return event(error_fields(error, request_id))

    return EventStream(choices, events, describe_error, request_id, service.settings.server.stream_comment_seconds)


def versions_of(usages: Iterable[Usage | None]) -> int | None:
    """The weight version that answered: the newest, if the weights changed between the choices."""
    return max((usage.version for usage in usages if usage is not None), default=None)
