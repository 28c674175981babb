"""One request, and all that can be seen of its answer.

In: an address, a request. Out: status, headers, body, events with their times; or what went wrong. Must never know what
an answer ought to be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from amalgam.errors import AmalgamError
from amalgam.tools.load.client import error_message
from amalgam.tools.load.http import Address, Connections, ExchangeError

MAX_BYTES = 32 * 2**20
_DELTA_TEXTS = ("content", "reasoning_content", "reasoning")


@dataclass
class Response:
    """An answer over HTTP.

    Attributes:
        status: 0: there was none, and `error_kind` says why: `connect`, `timeout`, `cut`, `protocol`.
        headers: by names in small letters; of a name that comes twice, the last.
        arrivals: when each piece of the body came, and how long the body was then.
        seconds: until the answer's end.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    seconds: float = 0.0
    error_kind: str = ""
    error: str = ""

    @property
    def json(self) -> Any:
        """The body; None if it is no JSON."""
        try:
            return orjson.loads(self.content)
        except orjson.JSONDecodeError:
            return None

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")

    @property
    def is_refusal(self) -> bool:
        return 400 <= self.status < 500

    @property
    def said(self) -> str:
        """Status or failure, and what the server says of it, on one line."""
        if not self.status:
            return f"{self.error_kind}: {self.error}"
        if self.status < 400:
            return f"HTTP {self.status}"
        return f"HTTP {self.status}: {' '.join(error_message(self.content).split())[:160]}"


class Reply:
    """The answer to a prompt, streamed or not; both of OpenAI's forms are read alike.

    Attributes:
        events: of a stream, each `data:` but `[DONE]`, with the time when it was there; what is no JSON is None.
        has_done: the stream ended with `[DONE]`.
    """

    def __init__(self, response: Response) -> None:
        self.response = response
        self.is_stream = response.headers.get("content-type", "").lower().startswith("text/event-stream")
        self.events: list[tuple[float, Any]] = []
        self.has_done = False
        if self.is_stream:
            self._read_events()

    def _read_events(self) -> None:
        begin, times = 0, iter(self.response.arrivals)
        now, end = next(times, (0.0, 0))
        for line in self.response.content.splitlines(keepends=True):
            begin += len(line)
            while end < begin:
                later = next(times, None)
                if later is None:
                    break
                now, end = later
            if not line.startswith(b"data:"):
                continue
            content = line[5:].strip()
            if content == b"[DONE]":
                self.has_done = True
                continue
            try:
                self.events.append((now, orjson.loads(content)))
            except orjson.JSONDecodeError:
                self.events.append((now, None))

    @property
    def bodies(self) -> list[Mapping[str, Any]]:
        """The answer's parts that are objects."""
        bodies = [event for _, event in self.events] if self.is_stream else [self.response.json]
        return [body for body in bodies if isinstance(body, dict)]

    @property
    def choices(self) -> list[Mapping[str, Any]]:
        return [choice for body in self.bodies for choice in body.get("choices") or () if isinstance(choice, dict)]

    @property
    def text(self) -> str:
        return "".join(map(text_of, self.choices))

    @property
    def finish_reasons(self) -> list[str]:
        return [str(choice["finish_reason"]) for choice in self.choices if choice.get("finish_reason")]

    @property
    def finish_reason(self) -> str:
        return self.finish_reasons[-1] if self.finish_reasons else ""

    @property
    def usage(self) -> Mapping[str, Any]:
        """Empty if there is none."""
        found = [body["usage"] for body in self.bodies if isinstance(body.get("usage"), dict)]
        return found[-1] if found else {}

    @property
    def num_prompt_tokens(self) -> int | None:
        return _count(self.usage.get("prompt_tokens"))

    @property
    def num_new_tokens(self) -> int | None:
        return _count(self.usage.get("completion_tokens"))

    @property
    def id(self) -> str:
        return str(self.bodies[0].get("id", "")) if self.bodies else ""


def text_of(choice: Mapping[str, Any]) -> str:
    """The text in a choice of an answer, or of an event."""
    message = choice.get("message") or choice.get("delta") or {}
    parts = [choice.get("text"), *(message.get(name) for name in _DELTA_TEXTS)]
    return "".join(part for part in parts if isinstance(part, str))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


class _Collector:
    """All of an answer, or its beginning."""

    def __init__(self, response: Response, leave_after: int | None) -> None:
        self._response = response
        self._leave_after = leave_after
        self._pieces: list[bytes] = []
        self._size = 0

    def head(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        self._response.status = status
        self._response.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        return self._leave_after == 0

    def piece(self, data: bytes, now: float) -> bool:
        self._pieces.append(data)
        self._size += len(data)
        self._response.arrivals.append((now, self._size))
        return self._size > MAX_BYTES or len(self._pieces) == self._leave_after

    def finish(self) -> None:
        self._response.content = b"".join(self._pieces)


async def fetch(
    address: Address,
    method: str,
    path: str,
    *,
    headers: Sequence[tuple[str, str]] = (),
    body: bytes = b"",
    timeout_seconds: float = 30.0,
    leave_after: int | None = None,
    on_head: asyncio.Event | None = None,
) -> Response:
    """One request on a connection of its own; nothing that goes wrong is raised.

    Args:
        leave_after: close the connection after so many pieces of the body; 0: after the headers.
        on_head: is set when the answer's first piece is there.
    """
    response = Response()
    collector = _Collector(response, leave_after)
    reader = collector if on_head is None else _Telling(collector, on_head)
    started = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_seconds):
            await Connections(address, keeps=False).exchange(method, path, headers, body, reader)
    except TimeoutError:
        response.error_kind, response.error = "timeout", f"no whole answer in {timeout_seconds:g} s"
    except ExchangeError as error:
        response.error_kind, response.error = error.kind, str(error)
    except AmalgamError as error:
        response.error_kind, response.error = "protocol", str(error)
    response.seconds = time.perf_counter() - started
    collector.finish()
    return response


class _Telling:
    """A reader that tells somebody of the first piece."""

    def __init__(self, reader: _Collector, event: asyncio.Event) -> None:
        self.head = reader.head
        self._reader = reader
        self._event = event

    def piece(self, data: bytes, now: float) -> bool:
        self._event.set()
        return self._reader.piece(data, now)
