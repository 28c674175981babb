"""How fast the engine is: tokens, requests and latencies, now and over the last ten minutes.

In: each step's figures, each change of the load, and each finished request's figures. Out: `Reading`, to any thread.
Must never know: tensors, HTTP.

The load (requests running and waiting, KV blocks in use) is weighted by time over fixed intervals: whoever reads, and
how often, sees the same means and peaks. Memory is bounded: the series keeps `NUM_POINTS` points, percentiles look at
the last `NUM_LATENCIES` requests.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from amalgam.base.clock import Clock
from amalgam.engine.request import FinishReason, RequestOutput

POINT_SECONDS = 2.0
NUM_POINTS = 300
NUM_LATENCIES = 2048
WINDOW_SECONDS = 600.0
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PER_TOKEN_BOUNDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
TOTAL_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Load(NamedTuple):
    """How much is under way at one moment."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0


class Level(NamedTuple):
    """A quantity over some time."""

    mean: float  # weighted by time
    peak: int


class Point(NamedTuple):
    """What happened in the `POINT_SECONDS` that begin at `time`; of the last point, what has happened so far."""

    time: float  # Unix seconds
    num_prompt_tokens: int
    num_new_tokens: int
    running: Level
    waiting: Level
    used_blocks: Level


@dataclass(frozen=True)
class Latency:
    """Of one finished request that had at least one token; in seconds."""

    finished_at: float  # by the meter's clock
    first_token: float
    per_token: float | None  # after the first; None if there was only one


@dataclass(frozen=True)
class Histogram:
    """Counts of values up to each bound, and their sum, as Prometheus has them but not yet cumulative."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds
    sum: float


@dataclass(frozen=True)
class Reading:
    """A consistent copy."""

    now: float
    num_prompt_tokens: int  # since the start
    num_new_tokens: int
    finished: Mapping[FinishReason, int]
    points: Sequence[Point]  # oldest first, without gaps, at most NUM_POINTS, at least one
    latencies: Sequence[Latency]  # of the last WINDOW_SECONDS
    first_token: Histogram
    per_token: Histogram
    total: Histogram


class _Interval:
    """A point in the making."""

    def __init__(self, time: float, since: float, load: Load) -> None:
        self.time = time
        self.since = since  # when measuring began, in the first one later than `time`
        self.num_prompt_tokens = 0
        self.num_new_tokens = 0
        self.integrals = [0.0] * len(load)
        self.peaks = list(load)

    def hold(self, load: Load, seconds: float) -> None:
        """`load` was so for `seconds`."""
        for index, value in enumerate(load):
            self.integrals[index] += value * seconds

    def rise(self, load: Load) -> None:
        self.peaks = [max(peak, value) for peak, value in zip(self.peaks, load, strict=True)]

    def read(self, now: float, load: Load, shift: float) -> Point:
        """The point as it is now, `shift` later by the clock on the wall."""
        seconds = min(now, self.time + POINT_SECONDS) - self.since
        means = [total / seconds for total in self.integrals] if seconds > 0 else [float(value) for value in load]
        levels = [Level(mean, peak) for mean, peak in zip(means, self.peaks, strict=True)]
        return Point(self.time + shift, self.num_prompt_tokens, self.num_new_tokens, *levels)


class _Bins:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def read(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.sum)


class Meter:
    """Counts. Any thread.

    Args:
        clock: gives the times; those of a `Reading` follow the wall clock as it is set then.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = Clock() if clock is None else clock
        self._lock = threading.Lock()
        self._num_prompt_tokens = 0
        self._num_new_tokens = 0
        self._finished: Counter[FinishReason] = Counter()
        self._load = Load()
        self._measured_to = self._clock.now()
        first = _Interval(_interval_start(self._measured_to), self._measured_to, self._load)
        self._intervals = deque([first], NUM_POINTS)
        self._latencies: deque[Latency] = deque(maxlen=NUM_LATENCIES)
        self._first_token, self._per_token = _Bins(FIRST_TOKEN_BOUNDS), _Bins(PER_TOKEN_BOUNDS)
        self._total = _Bins(TOTAL_BOUNDS)

    def set_load(self, load: Load) -> None:
        """From this moment on the load is another."""
        with self._lock:
            self._advance()
            self._load = load
            self._intervals[-1].rise(load)

    def add_step(self, num_prompt_tokens: int, num_new_tokens: int) -> None:
        """A step computed so many prompt tokens and gave so many new ones."""
        with self._lock:
            self._advance()
            self._num_prompt_tokens += num_prompt_tokens
            self._num_new_tokens += num_new_tokens
            self._intervals[-1].num_prompt_tokens += num_prompt_tokens
            self._intervals[-1].num_new_tokens += num_new_tokens

    def add_finished(self, output: RequestOutput) -> None:
        """A request has ended, for whatever reason."""
        assert output.finish_reason is not None
        usage = output.usage
        with self._lock:
            self._finished[output.finish_reason] += 1
            if usage is None or usage.num_new_tokens == 0:
                return
            decoding = usage.total_seconds - usage.first_token_seconds
            per_token = decoding / (usage.num_new_tokens - 1) if usage.num_new_tokens > 1 else None
            self._latencies.append(Latency(self._clock.now(), usage.first_token_seconds, per_token))
            self._first_token.add(usage.first_token_seconds)
            self._total.add(usage.total_seconds)
            if per_token is not None:
                self._per_token.add(per_token)

    def read(self) -> Reading:
        """The figures of this moment."""
        with self._lock:
            now, shift = self._advance(), self._clock.shift()
            return Reading(
                now + shift,
                self._num_prompt_tokens,
                self._num_new_tokens,
                dict(self._finished),
                [interval.read(now, self._load, shift) for interval in self._intervals],
                [latency for latency in self._latencies if latency.finished_at > now - WINDOW_SECONDS],
                self._first_token.read(),
                self._per_token.read(),
                self._total.read(),
            )

    def _advance(self) -> float:
        """Account for the time since the last call, in which the load stayed as it was; returns the time."""
        now = self._clock.now()
        first_kept = _interval_start(now) - (NUM_POINTS - 1) * POINT_SECONDS
        if self._intervals[-1].time < first_kept:  # nobody called for longer than is kept
            self._intervals.append(_Interval(first_kept, first_kept, self._load))
            self._measured_to = first_kept
        while (end := self._intervals[-1].time + POINT_SECONDS) <= now:
            self._intervals[-1].hold(self._load, end - self._measured_to)
            self._intervals.append(_Interval(end, end, self._load))
            self._measured_to = end
        self._intervals[-1].hold(self._load, now - self._measured_to)
        self._measured_to = now
        return now


def _interval_start(moment: float) -> float:
    return moment // POINT_SECONDS * POINT_SECONDS
