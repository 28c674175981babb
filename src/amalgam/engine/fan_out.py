"""Many requests of one caller, a limited number of them in flight.

In: what runs one request. Out: the results in order. Must never know: what a request is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from amalgam.errors import OverloadedError

ROOM_SECONDS = 0.05  # how soon a caller looks again whether the queue has room

T = TypeVar("T")
P = TypeVar("P")


async def fan_out(
    run: Callable[[P], Awaitable[T]], items: Sequence[P], max_in_flight: int, *, waits_for_first: bool = True
) -> list[T]:
    """What `run` gives for each item. At most `max_in_flight` run at a time, so that the queue has room for others.

    Who finds no place in the queue waits for one. If one fails, the others are cancelled and its error is raised.

    Args:
        waits_for_first: False: once one has found a place, the rest wait for theirs.

    Raises:
        OverloadedError: there is no place even for the first, which is not to wait.
    """
    results: dict[int, T] = {}
    waiting = iter(enumerate(items))
    num_in_flight = 0
    has_ended = asyncio.Event()  # one of ours, which may have made room

    async def run_one(item: P) -> T:
        nonlocal num_in_flight
        while True:
            num_in_flight += 1
            try:
                result = await run(item)
                has_ended.set()
                return result
            except OverloadedError:
                if num_in_flight == 1 and not results and not waits_for_first:
                    raise
            finally:
                num_in_flight -= 1
            has_ended.clear()
            with contextlib.suppress(TimeoutError):  # others make room too
                await asyncio.wait_for(has_ended.wait(), ROOM_SECONDS)

    async def work() -> None:
        for index, item in waiting:  # which all of us take from
            results[index] = await run_one(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(max_in_flight, len(items))):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [results[index] for index in range(len(items))]
