"""How much a caller may ask for: requests and tokens a minute.

In: callers, and tokens as they are used. Out: 429, or the answer with headers that say what is left (as OpenAI names
them). Must never know: what an endpoint does.

Buckets refill steadily by a clock that nobody sets. Tokens are known only when they are used, so that a caller may go
into debt with requests that were admitted before; the next one waits until that is paid. What is refused is refused
before anything is read or tokenized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from amalgam.base.clock import steady_seconds
from amalgam.errors import AmalgamError
from amalgam.server.http.errors import error_response
from amalgam.server.http.keys import Caller

MINUTE = 60.0


class RateLimitedError(AmalgamError):
    """The caller has used up what it may have in a minute."""

    http_status = 429
    code = "rate_limited"
    retry_after_seconds = 1


class TokenRateLimitedError(RateLimitedError):
    """It is tokens that the caller has used up."""

    code = "token_rate_limited"


class TokenBucket:
    """Holds at most `capacity`, and fills from empty in a minute. Its level may fall below zero."""

    def __init__(self, capacity: int, now: Callable[[], float] = steady_seconds) -> None:
        self.capacity = capacity
        self._now = now
        self._level = float(capacity)
        self._seen_at = now()

    def level(self) -> float:
        now = self._now()
        refill = max(now - self._seen_at, 0.0) * self.capacity / MINUTE
        self._level = min(self._level + refill, float(self.capacity))
        self._seen_at = now
        return self._level

    def take(self, count: int) -> None:
        self._level = self.level() - count

    def seconds_until(self, level: float) -> float:
        return max(level - self.level(), 0.0) * MINUTE / self.capacity


@dataclass(frozen=True)
class _Buckets:
    """Of one caller; None: no limit."""

    requests: TokenBucket | None
    tokens: TokenBucket | None

    @classmethod
    def of(cls, caller: Caller, now: Callable[[], float]) -> _Buckets:
        limits = caller.requests_per_minute, caller.tokens_per_minute
        return cls(*(TokenBucket(limit, now) if limit else None for limit in limits))

    def hold_for(self, caller: Caller) -> bool:
        limits = tuple(bucket.capacity if bucket else 0 for bucket in (self.requests, self.tokens))
        return limits == (caller.requests_per_minute, caller.tokens_per_minute)

    def admit(self) -> None:
        """Take one request.

        Raises:
            RateLimitedError: there is none left, or no token.
        """
        limits = (("requests", self.requests, RateLimitedError), ("tokens", self.tokens, TokenRateLimitedError))
        for name, bucket, kind in limits:
            if bucket is not None and bucket.level() < 1:
                error = kind(
                    f"This key may use {bucket.capacity} {name} a minute, and has.", remedy="Retry-After says when."
                )
                error.retry_after_seconds = max(1, math.ceil(bucket.seconds_until(1)))
                raise error
        if self.requests is not None:
            self.requests.take(1)

    def headers(self) -> list[tuple[bytes, bytes]]:
        found = []
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket is not None:
                values = {
                    "limit": str(bucket.capacity),
                    "remaining": str(max(0, math.floor(bucket.level()))),
                    "reset": written(bucket.seconds_until(bucket.capacity)),
                }
                found += [(f"x-ratelimit-{key}-{name}".encode(), value.encode()) for key, value in values.items()]
        return found


class RateLimits:
    """Refuses requests above their caller's limits. Behind `KeyGuard`, which says who calls and what counts."""

    def __init__(self, app: ASGIApp, now: Callable[[], float] = steady_seconds) -> None:
        self.app = app
        self._now = now
        self._buckets: dict[str, _Buckets] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["state"]["is_metered"]:
            await self.app(scope, receive, send)
            return
        buckets = self._buckets_of(scope["state"]["caller"])

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *buckets.headers()]
            await send(message)

        try:
            buckets.admit()
        except RateLimitedError as error:
            await error_response(error)(scope, receive, send_with_limits)
            return
        if buckets.tokens is not None:
            scope["state"]["record"].charge = buckets.tokens.take
        await self.app(scope, receive, send_with_limits)

    def _buckets_of(self, caller: Caller) -> _Buckets:
        """Made anew where the limits have changed."""
        buckets = self._buckets.get(caller.name)
        if buckets is None or not buckets.hold_for(caller):
            buckets = self._buckets[caller.name] = _Buckets.of(caller, self._now)
        return buckets


def written(seconds: float) -> str:
    """A duration as OpenAI's headers have it: `120ms`, `6.5s`, `1m0s`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds / 1000, 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:g}s"
