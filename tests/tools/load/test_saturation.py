"""The search, on a server that is a formula."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from amalgam.tools.load.metrics import Errors, Goodput, Point, figures
from amalgam.tools.load.running import Load, Measured
from amalgam.tools.load.saturation import PRECISION, Saturation, find, refusal

NOTHING = figures(Measured(Load()))


class Server:
    """Answers `capacity` requests a second, each of `seconds` while it is not full.

    Attributes:
        limit: of the rate, above which fewer than 90% meet the objectives; None: there are none.
        refuses_above: requests under way; the rest fail.
    """

    def __init__(
        self, capacity: float, seconds: float = 1.0, limit: float | None = None, refuses_above: int | None = None
    ) -> None:
        self.capacity, self.seconds, self.limit, self.refuses_above = capacity, seconds, limit, refuses_above
        self.loads: list[Load] = []
        self.gone_at: int | None = None

    async def measure(self, load: Load) -> Point:
        self.loads.append(load)
        offered = load.rate or (load.concurrency or 0) / self.seconds
        answered = min(offered, self.capacity)
        share = 1.0 if self.limit is None else min(1.0, 0.9 * (self.limit / offered) ** 2)
        num_failed = 50 if self.refuses_above is not None and (load.concurrency or 0) > self.refuses_above else 0
        return replace(
            NOTHING,
            load=load,
            num_sent=100,
            num_completed=100 - num_failed,
            requests_per_second=answered,
            errors={"HTTP 429": Errors(num_failed, "")} if num_failed else {},
            slope=offered - answered,
            sending_seconds=1000.0,
            goodput=None if self.limit is None else Goodput(share, 0.0, {}),
            is_gone=len(self.loads) == self.gone_at,
        )


def search(server: Server, max_clients: int = 256) -> Saturation:
    found = Saturation()
    asyncio.run(find(server.measure, found, arrivals="constant", burst=1, max_clients=max_clients, attainment=0.9))
    return found


@pytest.mark.parametrize("capacity", [0.37, 10.0, 155.0])
def test_what_is_answered(capacity: float) -> None:
    found = search(Server(capacity))
    assert found.capacity == pytest.approx(capacity)
    assert 0.95 * capacity <= found.requests_per_second <= 1.1 * capacity
    assert found.not_borne and found.not_borne <= PRECISION * found.requests_per_second
    assert len(found.probes) <= 9
    assert found.probes[-1].rate == found.requests_per_second, "measured once more"


@pytest.mark.parametrize("limit", [0.9, 3.0, 9.0])
def test_what_meets_the_objectives(limit: float) -> None:
    found = search(Server(10.0, limit=limit))
    assert found.requests_per_second == pytest.approx(limit, rel=0.05)
    assert found.requests_per_second <= limit


def test_what_is_refused_counts_against_a_load() -> None:
    server = Server(100.0, refuses_above=8)
    assert search(server).clients <= 16
    assert max(load.concurrency or 0 for load in server.loads) == 16


def test_no_more_clients_than_allowed() -> None:
    server = Server(1000.0)
    assert search(server, max_clients=20).clients == 16


def test_a_server_that_goes_away_leaves_what_was_found() -> None:
    server = Server(10.0)
    server.gone_at = 8
    found = search(server)
    assert found.capacity == 10.0 and len(server.loads) == 8


def test_a_rate_that_is_borne_by_luck_is_not_the_result() -> None:
    class Lucky(Server):
        """Bears the first rate above its capacity that it is asked for."""

        async def measure(self, load: Load) -> Point:
            point = await super().measure(load)
            is_first = sum((one.rate or 0) > self.capacity for one in self.loads) == 1
            return replace(point, slope=0.0) if is_first and (load.rate or 0) > self.capacity else point

    found = search(Lucky(9.9, seconds=0.99))
    assert 0.9 * 9.9 <= found.requests_per_second <= 1.05 * 9.9


def test_chance_is_no_growth() -> None:
    point = replace(
        NOTHING, load=Load(rate=4.0), num_completed=40, mean_concurrency=2.0, slope=0.4, sending_seconds=10.0
    )
    assert not refusal(point, 0.9), "2.7 more at the end, of two: that happens"
    assert refusal(replace(point, sending_seconds=60.0), 0.9)
