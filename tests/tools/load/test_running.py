"""When requests are sent, and what a run does when the server is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from itertools import pairwise, repeat

import pytest

from amalgam.tools.load.client import Answer, Question
from amalgam.tools.load.running import GONE_AFTER, Load, Measured, run, schedule

QUESTIONS: Iterator[Question] = repeat(Question("q", 1))


class Asker:
    """Answers after a while, and not before so many have asked; from the `gone`th request on nobody listens."""

    def __init__(self, seconds: float = 0.0, gone: int | None = None, company: int = 0) -> None:
        self.seconds, self.gone, self.company = seconds, gone, company
        self.num_asked = self.under_way = self.most = 0

    async def ask(self, question: Question, *, into: Answer | None = None) -> Answer:
        assert into is not None
        self.num_asked += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        into.sent = time.perf_counter()
        if self.gone is not None and self.num_asked > self.gone:
            into.error_kind = "connect"
        await asyncio.sleep(self.seconds)
        while self.num_asked < self.company:  # noqa: ASYNC110 – the others are asked in this loop
            await asyncio.sleep(0.001)
        into.ended = time.perf_counter()
        self.under_way -= 1
        return into


def measure(load: Load, asker: Asker, count: int | None = None, seconds: float | None = None) -> Measured:
    measured = Measured(load)
    asyncio.run(run(asker, QUESTIONS, measured, count=count, seconds=seconds))
    return measured


def test_times_of_requests() -> None:
    assert schedule(4, Load(2.0, arrivals="constant")) == [0, 0.5, 1, 1.5]
    assert schedule(5, Load(2.0, arrivals="burst", burst=2)) == [0, 0, 1, 1, 2]
    times = schedule(20000, Load(100.0), seed=1)
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= 200
    assert mean == pytest.approx(0.01, rel=0.01)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.05), "as an exponential distribution has it"
    assert schedule(10, Load(1.0), seed=1) != schedule(10, Load(1.0), seed=2)


def test_clients_send_one_after_the_other() -> None:
    asker = Asker()
    measured = measure(Load(concurrency=3), asker, count=20)
    assert (asker.num_asked, asker.most, measured.num_sent, len(measured.answers)) == (20, 3, 20, 20)
    assert measured.generator.cpu_seconds > 0


def test_a_rate_does_not_wait_for_answers_unless_it_is_told_to() -> None:
    load = Load(1000.0, arrivals="constant")
    waiting = Asker(company=20)
    measure(load, waiting, count=20)
    assert waiting.most == 20
    limited = Asker(seconds=0.005)
    measured = measure(Load(1000.0, concurrency=2, arrivals="constant"), limited, count=20)
    assert limited.most == 2 and limited.num_asked == 20
    assert max(answer.sent - answer.due for answer in measured.answers) > 0.002, "what waits here is told apart"


def test_seconds_end_the_sending() -> None:
    asker = Asker()
    assert measure(Load(500.0, arrivals="constant"), asker, seconds=0.02).num_sent == 10
    assert measure(Load(500.0, arrivals="constant"), asker, count=4, seconds=0.02).num_sent == 4
    assert measure(Load(concurrency=1), Asker(seconds=0.001), seconds=0.01).num_sent >= 1


@pytest.mark.parametrize("load", [Load(concurrency=2), Load(2000.0, arrivals="constant")])
def test_a_server_that_goes_away_ends_the_run(load: Load) -> None:
    asker, count = Asker(gone=5), 20_000  # ten seconds of the rate: a machine that stands still a while sends many late
    measured = measure(load, asker, count=count)
    assert measured.is_gone
    assert 5 + GONE_AFTER <= asker.num_asked < count
    assert sum(not answer.error_kind for answer in measured.answers) == 5
