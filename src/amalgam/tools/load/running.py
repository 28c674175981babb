"""Load: when requests are sent, and by how many clients; their answers, and how well the sending kept up.

In: a client, questions, a load. Out: answers. Must never know what the figures mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import resource
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from amalgam.tools.load.client import Answer, Question

Arrivals = Literal["poisson", "constant", "burst"]

GONE_AFTER = 8  # requests in a row without a connection: nobody listens any more
_TICK_SECONDS = 0.01  # how often the event loop's own delay is looked at
_MADE_AHEAD = 16  # questions for each client, where their number is not known
_PAUSE_SECONDS = 0.1  # of a client whose request has failed: refusals come at once


class Asker(Protocol):
    async def ask(self, question: Question, *, into: Answer | None = None) -> Answer: ...


@dataclass(frozen=True)
class Load:
    """How requests come.

    Attributes:
        rate: requests a second, whether or not others have ended; None: each client sends the next one when its last
            one has ended.
        concurrency: clients; with a rate the most requests under way, None: any number.
        burst: requests that come together, with arrivals in bursts.
    """

    rate: float | None = None
    concurrency: int | None = None
    arrivals: Arrivals = "poisson"
    burst: int = 1

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} at a time"
        limit = f", at most {self.concurrency} at a time" if self.concurrency else ""
        return f"{self.rate:.4g} req/s{limit}"


@dataclass
class Generator:
    """How well the sending program kept up.

    Attributes:
        loop_lags: seconds that its event loop was late, looked at a hundred times a second.
        cpu_seconds: processor time of this process.
    """

    loop_lags: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """While it lasts, delays are noted."""
        started = time.process_time()
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            self.cpu_seconds += time.process_time() - started

    async def _watch(self) -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(_TICK_SECONDS)
            self.loop_lags.append(max(0.0, time.perf_counter() - before - _TICK_SECONDS))


@dataclass
class Measured:
    """What came of a load; filled while it runs, so that what there is outlives an interruption.

    Attributes:
        answers: that have ended, in any order.
        num_sent: requests.
        seconds: from the first request to the last answer's end.
        sending_seconds: from the first request until no more were sent.
        is_gone: the server went away, and so no more were sent.
    """

    load: Load
    answers: list[Answer] = field(default_factory=list)
    num_sent: int = 0
    started: float = 0.0
    seconds: float = 0.0
    sending_seconds: float = 0.0
    is_gone: bool = False
    generator: Generator = field(default_factory=Generator)


def schedule(count: int, load: Load, seed: int = 0) -> list[float]:
    """When `count` requests are due, in seconds from the first one's slot; they last for `count / rate` in all cases.

    Poisson arrivals, given their number, are as many independent moments, each as likely as any other; so drawn, the
    rate is the one asked for, and not only on the average.
    """
    assert load.rate is not None
    if load.arrivals == "poisson":
        chances = random.Random(seed)
        return sorted(chances.uniform(0, count / load.rate) for _ in range(count))
    burst = load.burst if load.arrivals == "burst" else 1
    return [index // burst * burst / load.rate for index in range(count)]


async def run(
    asker: Asker,
    questions: Iterator[Question],
    measured: Measured,
    *,
    count: int | None,
    seconds: float | None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Put `measured.load` on a server, and wait for all answers.

    Args:
        count: requests; None: as many as `seconds` take.
        seconds: none is sent later; None: any time.
        progress: is told how many answers have ended.
    """
    assert count is not None or seconds is not None
    load = measured.load
    times: list[float] = []
    if load.rate is not None:
        if count is None or (seconds is not None and load.rate * seconds < count):
            assert seconds is not None
            count = max(1, round(load.rate * seconds))
        times = schedule(count, load, seed)
    # Making questions takes time that is not the server's: as many as are known to be needed are made before.
    ahead = list(itertools.islice(questions, _MADE_AHEAD * (load.concurrency or 1) if count is None else count))
    runner = _Runner(asker, itertools.chain(ahead, questions), measured, progress)
    _raise_descriptor_limit()
    async with measured.generator.watching():
        measured.started = time.perf_counter()
        await (runner.closed(count, seconds) if load.rate is None else runner.open(times))


class _Runner:
    def __init__(
        self,
        asker: Asker,
        questions: Iterator[Question],
        measured: Measured,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._asker = asker
        self._questions = questions
        self._measured = measured
        self._progress = progress
        self._num_unconnected = 0  # in a row

    async def closed(self, count: int | None, seconds: float | None) -> None:
        """Clients, each of which sends the next request when its last one has ended."""
        measured = self._measured

        async def client() -> None:
            while not measured.is_gone and (count is None or measured.num_sent < count):
                now = time.perf_counter()
                if seconds is not None and now - measured.started >= seconds:
                    break
                answer = await self._ask(next(self._questions), now)
                if answer.error_kind:
                    await asyncio.sleep(_PAUSE_SECONDS)
            measured.sending_seconds = measured.sending_seconds or time.perf_counter() - measured.started

        async with asyncio.TaskGroup() as group:
            for _ in range(measured.load.concurrency or 1):
                group.create_task(client())

    async def open(self, times: list[float]) -> None:
        """Requests at their times, or as soon after as the limit of those under way allows."""
        measured = self._measured
        room = asyncio.Semaphore(measured.load.concurrency or len(times))

        async def one(question: Question, due: float) -> None:
            async with room:
                if not measured.is_gone:
                    await self._ask(question, due)

        async with asyncio.TaskGroup() as group:
            for time_ in times:
                due = measured.started + time_
                if (wait := due - time.perf_counter()) > 0:
                    await asyncio.sleep(wait)
                if measured.is_gone:
                    break
                group.create_task(one(next(self._questions), due))
            measured.sending_seconds = time.perf_counter() - measured.started

    async def _ask(self, question: Question, due: float) -> Answer:
        measured = self._measured
        measured.num_sent += 1
        answer = await self._asker.ask(question, into=Answer(question, due))
        measured.answers.append(answer)
        measured.seconds = max(measured.seconds, answer.ended - measured.started)
        self._num_unconnected = self._num_unconnected + 1 if answer.error_kind == "connect" else 0
        measured.is_gone |= self._num_unconnected >= GONE_AFTER
        if self._progress is not None:
            self._progress(len(measured.answers))
        return answer


def _raise_descriptor_limit() -> None:
    """Each request under way is a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
