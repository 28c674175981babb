"""Many requests of one caller on a queue with little room."""

from __future__ import annotations

import asyncio

import pytest

from amalgam.engine.fan_out import fan_out
from amalgam.errors import OverloadedError
from tests.errors import raises


class Queue:
    """Takes so many requests at a time; each ends when the loop comes by.

    Attributes:
        most: that ran together.
        ended: in the order of their ends; None: it gave nothing.
    """

    def __init__(self, num_places: int, num_refused: int = 0) -> None:
        self.num_places, self.num_refused = num_places, num_refused
        self.running = self.most = 0
        self.ended: list[int | None] = []

    async def run(self, item: int) -> str:
        if self.num_refused or self.running >= self.num_places:
            self.num_refused = max(0, self.num_refused - 1)
            raise OverloadedError("The queue is full.")
        self.running += 1
        self.most = max(self.most, self.running)
        ended: int | None = None
        try:
            await asyncio.sleep(0)
            if item == 13:
                raise RuntimeError("unlucky")
            ended = item
            return f"{item}"
        finally:
            self.running -= 1
            self.ended.append(ended)


@pytest.mark.parametrize("waits_for_first", [True, False])
@pytest.mark.parametrize(("num_places", "max_in_flight", "most"), [(100, 3, 3), (2, 8, 2), (1, 1, 1)])
def test_results_are_in_order_and_no_more_run_than_may(
    num_places: int, max_in_flight: int, most: int, waits_for_first: bool
) -> None:
    queue = Queue(num_places)
    results = asyncio.run(fan_out(queue.run, range(10), max_in_flight, waits_for_first=waits_for_first))
    assert (results, queue.most) == ([f"{item}" for item in range(10)], most)


def test_the_first_waits_for_room_or_is_refused() -> None:
    assert asyncio.run(fan_out(Queue(1, num_refused=2).run, [5, 6], 1)) == ["5", "6"]
    queue = Queue(1, num_refused=1)
    with raises(OverloadedError):
        asyncio.run(fan_out(queue.run, [5, 6], 1, waits_for_first=False))
    assert queue.ended == []


def test_an_error_of_one_cancels_the_others() -> None:
    queue = Queue(100)
    with pytest.raises(RuntimeError):
        asyncio.run(fan_out(queue.run, [13, *range(20)], 4))
    assert queue.running == 0
    assert len(queue.ended) < 20


def test_nothing_is_nothing() -> None:
    assert asyncio.run(fan_out(Queue(0).run, [], 4)) == []
