"""Clients of a server that completes text, as OpenAI's interface streams it: many at once, at little cost.

In: an address, and requests. Out: for each request when its tokens came, or why it was refused. Must never know which
server it is, nor how it was started. Sockets are read here, since clients share the cores with the server they time.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class Address:
    """A server, and what it is to be told beside prompt and length.

    Attributes:
        fields: further fields of every request's body.
    """

    port: int
    model: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    prompt: str
    num_tokens: int


@dataclass
class Answer:
    """One request's fate; times are those of `time.perf_counter`.

    Attributes:
        arrivals: when each event with text came.
        status: of the HTTP answer, 0 if there was none.
        error: what went wrong, empty for a whole answer.
    """

    request: Request
    sent: float
    arrivals: list[float] = field(default_factory=list)
    ended: float = 0.0
    status: int = 0
    error: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_new_tokens: int = 0

    @property
    def first_token_seconds(self) -> float:
        return self.arrivals[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in pairwise(self.arrivals)]


async def complete(
    address: Address, request: Request, *, into: Answer | None = None, leave_after: int | None = None
) -> Answer:
    """Send one request and read its stream to the end.

    Args:
        into: what to fill, for who looks at it meanwhile.
        leave_after: close the connection after so many events, as a user who stops does.
    """
    body = {
        "model": address.model,
        "prompt": request.prompt,
        "max_tokens": request.num_tokens,
        "temperature": 1.0,
        "top_p": 1.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **address.fields,
    }
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{address.port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    answer = into or Answer(request, time.perf_counter())
    writer = None
    try:
        connecting = asyncio.open_connection("127.0.0.1", address.port, limit=1 << 20)
        reader, writer = await asyncio.wait_for(connecting, CONNECT_SECONDS)
        writer.write(head.encode() + content)
        if leave_after == 0:
            await writer.drain()
            return answer
        await _read(reader, answer, leave_after)
    except (OSError, asyncio.IncompleteReadError, ValueError, KeyError) as error:
        answer.error = answer.error or f"{type(error).__name__}: {error}"
    finally:
        answer.ended = time.perf_counter()
        if writer is not None:
            if leave_after is not None:
                writer.transport.abort()
            writer.close()
    return answer


async def _read(reader: asyncio.StreamReader, answer: Answer, leave_after: int | None) -> None:
    answer.status = int((await reader.readline()).split()[1])
    is_chunked = False
    while line := (await reader.readline()).strip().lower():
        is_chunked |= line.startswith(b"transfer-encoding:") and b"chunked" in line
    parts = _chunks(reader) if is_chunked else _rest(reader)
    if answer.status != 200:
        answer.error = b"".join([part async for part in parts]).decode(errors="replace")[:500]
        return
    is_whole = False
    async for event in _events(parts):
        if event == b"[DONE]":
            is_whole = True
            continue
        now, fields = time.perf_counter(), json.loads(event)
        if "error" in fields:
            answer.error = json.dumps(fields["error"])[:500]
            return
        if any(choice.get("text") for choice in fields.get("choices", ())):
            answer.arrivals.append(now)
        if usage := fields.get("usage"):
            answer.num_prompt_tokens = usage["prompt_tokens"]
            answer.num_new_tokens = usage["completion_tokens"]
            answer.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        if leave_after is not None and len(answer.arrivals) >= leave_after:
            return
    if not is_whole:
        answer.error = "the stream ended before [DONE]"
    elif not answer.arrivals:
        answer.error = "no text"


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while length := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(length + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(1 << 16):
        yield part


async def _events(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events."""
    pending = b""
    async for part in parts:
        *lines, pending = (pending + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


async def closed_loop(
    address: Address, requests: Iterable[Request], num_clients: int, complete: Complete = complete
) -> list[Answer]:
    """So many clients, each of which sends the next request when its last one has ended."""
    waiting = iter(requests)
    answers: list[Answer] = []

    async def client() -> None:
        for request in waiting:
            answers.append(await complete(address, request))

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return answers


Complete = Callable[[Address, Request], Awaitable[Answer]]


async def open_loop(address: Address, requests: Iterable[Request], per_second: float, seed: int = 0) -> list[Answer]:
    """Requests that arrive at random (a Poisson process), whether or not others have ended."""
    pauses = random.Random(seed)
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request in requests:
            tasks.append(group.create_task(complete(address, request)))
            await asyncio.sleep(pauses.expovariate(per_second))
    return [task.result() for task in tasks]


def check(answers: Sequence[Answer]) -> None:
    """Raises:
    RuntimeError: an answer is an error, or not as long as was asked for.
    """
    for answer in answers:
        if answer.error:
            raise RuntimeError(f"status {answer.status}: {answer.error}")
        if answer.num_new_tokens != answer.request.num_tokens:
            raise RuntimeError(f"{answer.num_new_tokens} tokens instead of {answer.request.num_tokens}")


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; nan of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
