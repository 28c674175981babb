"""What is known of one HTTP request at its end: its log line, its span and its caller's limits are made of it.

In: what the parts of the server note while the request goes on. Out: figures. Must never know: what an endpoint does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class PromptUse:
    """How much of one prompt the record has counted."""

    prompt_ids: Sequence[int]
    num_tokens: int = 0


@dataclass(slots=True)
class RequestRecord:
    """One request, until its answer has been sent. Belongs to the event loop.

    Attributes:
        started_at, deadline: by `time.monotonic`, which is the event loop's clock too.
        caller: name of the key; empty without one.
        priority: of the key, which those of its requests are added to.
        may_overtake: whether a request may have a priority below the key's.
        num_prompt_tokens: of all prompts, as far as they were computed for it; several samples of one prompt count
            once.
        first_token_seconds: from the request's arrival.
        received_at: when its whole body was there, by the same clock.
        charge: takes tokens as they are used, for the caller's limit.
    """

    request_id: str
    method: str = ""
    path: str = ""
    route: str = ""  # as declared, `/v1/models/{name}`
    started_at: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)  # Unix time
    received_at: float | None = None
    deadline: float | None = None
    seconds: float = 0.0
    status: int = 0
    error: str = ""  # the code of what the answer told of, or a stream ended with
    caller: str = ""
    priority: int = 0
    may_overtake: bool = True
    prompts: list[str] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompts, found in the prefix cache
    num_new_tokens: int = 0
    first_token_seconds: float | None = None
    queue_seconds: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    weights: Any = None  # the weight version that it has chosen, for the engine
    weight_version: int | None = None  # its id
    may_move: bool = False  # whether it was chosen for the request, which has not asked for it
    session: str = ""  # what the client calls the requests that belong together
    traceparent: str = ""  # of W3C Trace Context, as it came
    tracestate: str = ""
    charge: Callable[[int], None] | None = None
    last_prompt: PromptUse | None = None

    def prompt_use(self, prompt_ids: Sequence[int]) -> PromptUse:
        """For `add_prompt`; the same for several samples of one prompt, which come one after the other."""
        if self.last_prompt is None or self.last_prompt.prompt_ids is not prompt_ids:
            self.last_prompt = PromptUse(prompt_ids)
        return self.last_prompt

    def add_prompt(self, use: PromptUse, num_tokens: int) -> None:
        """So many of a prompt's tokens have been computed by now."""
        if num_tokens > use.num_tokens:
            self.add_prompt_tokens(num_tokens - use.num_tokens)
            use.num_tokens = num_tokens

    def add_prompt_tokens(self, count: int) -> None:
        self.num_prompt_tokens += count
        self._charge(count)

    def add_new_tokens(self, count: int) -> None:
        if self.first_token_seconds is None and count:
            self.first_token_seconds = time.monotonic() - self.started_at
        self.num_new_tokens += count
        self._charge(count)

    def _charge(self, count: int) -> None:
        if self.charge is not None and count:
            self.charge(count)


current_record: ContextVar[RequestRecord | None] = ContextVar("current_record", default=None)
