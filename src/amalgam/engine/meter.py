"""How fast the engine is: tokens, requests and latencies, now and over the last ten minutes.

In: each step's figures and each finished request's. Out: `Reading`, to any thread. Must never know: tensors, HTTP.

Memory is bounded: the series keeps `NUM_POINTS` points, percentiles look at the last `NUM_LATENCIES` requests.
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


class Point(NamedTuple):
    """What happened in the `POINT_SECONDS` that begin at `time`, and how things stood at the end of their last step."""

    time: float  # Unix seconds
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0


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
    points: Sequence[Point]  # oldest first, without gaps, at most NUM_POINTS
    latencies: Sequence[Latency]  # of the last WINDOW_SECONDS
    first_token: Histogram
    per_token: Histogram
    total: Histogram


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
        self._points: deque[Point] = deque(maxlen=NUM_POINTS)
        self._latencies: deque[Latency] = deque(maxlen=NUM_LATENCIES)
        self._first_token, self._per_token = _Bins(FIRST_TOKEN_BOUNDS), _Bins(PER_TOKEN_BOUNDS)
        self._total = _Bins(TOTAL_BOUNDS)

    def add_step(
        self, num_prompt_tokens: int, num_new_tokens: int, num_running: int, num_waiting: int, num_used_blocks: int
    ) -> None:
        """A step computed so many prompt tokens and gave so many new ones; then this was the state."""
        with self._lock:
            self._num_prompt_tokens += num_prompt_tokens
            self._num_new_tokens += num_new_tokens
            start = self._clock.now() // POINT_SECONDS * POINT_SECONDS
            last = self._points[-1] if self._points else None
            if last is not None and last.time == start:
                self._points.pop()
                num_prompt_tokens += last.num_prompt_tokens
                num_new_tokens += last.num_new_tokens
            self._points.append(
                Point(start, num_prompt_tokens, num_new_tokens, num_running, num_waiting, num_used_blocks)
            )

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
            now, shift = self._clock.now(), self._clock.shift()
            return Reading(
                now + shift,
                self._num_prompt_tokens,
                self._num_new_tokens,
                dict(self._finished),
                [point._replace(time=point.time + shift) for point in _without_gaps(self._points, now)],
                [latency for latency in self._latencies if latency.finished_at > now - WINDOW_SECONDS],
                self._first_token.read(),
                self._per_token.read(),
                self._total.read(),
            )


def _without_gaps(points: Sequence[Point], now: float) -> list[Point]:
    """Points up to `now`: where no step ended nothing was computed, and the state is the one before."""
    if not points:
        return []
    by_time = {point.time: point for point in points}
    end = now // POINT_SECONDS * POINT_SECONDS
    moment = max(points[0].time, end - (NUM_POINTS - 1) * POINT_SECONDS)
    state = max((point for point in points if point.time <= moment), key=lambda point: point.time)
    result = []
    while moment <= end:
        state = by_time.get(moment) or state._replace(time=moment, num_prompt_tokens=0, num_new_tokens=0)
        result.append(state)
        moment += POINT_SECONDS
    return result
