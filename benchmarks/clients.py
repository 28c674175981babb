"""Clients of a server that completes text, as OpenAI's interface streams it: many at once, at little cost.

In: an address, and requests. Out: for each request when its tokens came, or why it was refused. Must never know which
server it is, nor how it was started.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from amalgam.tools.load import http
from amalgam.tools.load.client import Answer, Client
from amalgam.tools.load.client import Question as Request


@dataclass(frozen=True)
class Address:
    """A server, and what it is to be told beside prompt and length.

    Attributes:
        fields: further fields of every request's body.
    """

    port: int
    model: str
    fields: dict[str, Any] = field(default_factory=dict)


async def complete(
    address: Address, request: Request, *, into: Answer | None = None, leave_after: int | None = None
) -> Answer:
    """Send one request over a connection of its own and read its stream to the end.

    Args:
        into: what to fill, for who looks at it meanwhile.
        leave_after: close the connection after so many events, as a user who stops does.
    """
    to = http.Address("http", "127.0.0.1", address.port)
    fields = {"temperature": 1.0, "top_p": 1.0, **address.fields}
    client = Client(to, "completions", address.model, fields=fields, timeout_seconds=3600, keeps_connections=False)
    return await client.ask(request, into=into, leave_after=leave_after)


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
        if answer.error_kind:
            raise RuntimeError(f"status {answer.status}, {answer.error_kind}: {answer.error}")
        if answer.num_new_tokens != answer.question.num_tokens:
            raise RuntimeError(f"{answer.num_new_tokens} tokens instead of {answer.question.num_tokens}")


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; nan of nothing."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
