"""How fast the engine is: tokens, requests and latencies, now and over the last ten minutes.

In: each step's figures, each change of the load, and each finished request's figures. Out: `Reading`, to any thread.
Must never know: tensors, HTTP.

The load (requests running and waiting, KV blocks in use) is weighted by time over fixed intervals: whoever reads, and
how often, sees the same means and peaks. Memory is bounded: the series keeps `NUM_POINTS` points, percentiles look at
the last `NUM_LATENCIES` requests.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from amalgam.base.clock import Clock
from amalgam.base.histogram import Bins, Histogram
from amalgam.engine.request import FinishReason, RequestOutput

POINT_SECONDS = 2.0
NUM_POINTS = 300
NUM_LATENCIES = 2048
WINDOW_SECONDS = 600.0
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
PER_TOKEN_BOUNDS = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
TOTAL_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
QUEUE_BOUNDS = (0.001, 0.01, *TOTAL_BOUNDS)
STEP_BOUNDS = (0.001, *PER_TOKEN_BOUNDS)
TOKEN_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Load(NamedTuple):
    """How much is under way at one moment."""

    num_running: int = 0
    num_waiting: int = 0
    num_used_blocks: int = 0


class Counts(NamedTuple):
    """What the scheduler has done since the start."""

    num_preemptions: int = 0  # requests that gave their blocks back and waited again
    num_prefix_query_tokens: int = 0  # prompt tokens of requests that looked for shared blocks
    num_prefix_hit_tokens: int = 0  # those whose keys and values were there already


class SpeculationCounts(NamedTuple):
    """What has come of guesses since the start."""

    num_drafts: int = 0  # times that a request was given guesses
    num_proposed: int = 0  # tokens guessed, and computed behind a request's own
    num_accepted: int = 0  # of these, tokens that the model chose itself
    accepted_at: tuple[int, ...] = ()  # the same by their place in the guess, the first one first
    num_declined: int = 0  # times that a request could have been given guesses, and it did not pay
    proposing_seconds: float = 0.0  # time that guessing took

    @property
    def acceptance(self) -> float | None:
        """Share of the guesses that came true; None: there were none."""
        return self.num_accepted / self.num_proposed if self.num_proposed else None


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
class Reading:
    """A consistent copy."""

    now: float
    num_prompt_tokens: int  # since the start
    num_new_tokens: int
    finished: Mapping[FinishReason, int]
    points: Sequence[Point]  # oldest first, without gaps, at most NUM_POINTS, at least one
    latencies: Sequence[Latency]  # of the last WINDOW_SECONDS
    first_token: Histogram  # seconds from arrival to the first token, of finished requests
    per_token: Histogram  # seconds between later tokens, each request's mean
    total: Histogram  # seconds from arrival to the end
    queue: Histogram  # seconds from submission to the first step, of finished requests that had one
    prompt: Histogram  # seconds from there to the first token
    answer: Histogram  # seconds from there to the end
    inference: Histogram  # both together: seconds from the first step to the end
    inter_token: Histogram  # seconds between a request's outputs, each step's
    prompt_lengths: Histogram  # tokens, of finished requests that had a step
    answer_lengths: Histogram  # tokens
    step: Histogram  # seconds that a step took
    step_tokens: Histogram  # tokens that it computed: prompt, generated, computed again, guessed
    distinct_experts: Histogram | None  # experts that a step computed with in one layer, mean over layers; exact
    counts: Counts
    speculation: SpeculationCounts | None  # None: nothing is guessed


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


class Meter:
    """Counts. Any thread.

    Args:
        clock: gives the times; those of a `Reading` follow the wall clock as it is set then.
        distinct_experts: asked at each `read`; None: nobody sees the routing.
        speculation: the same; None: nothing is guessed.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        distinct_experts: Callable[[], Histogram | None] = lambda: None,
        speculation: Callable[[], SpeculationCounts | None] = lambda: None,
    ) -> None:
        self._clock = Clock() if clock is None else clock
        self._lock = threading.Lock()
        self._num_prompt_tokens = 0
        self._num_new_tokens = 0
        self._finished: Counter[FinishReason] = Counter()
        self._load = Load()
        self._counts = Counts()
        self._distinct_experts = distinct_experts
        self._speculation = speculation
        self._measured_to = self._clock.now()
        first = _Interval(_interval_start(self._measured_to), self._measured_to, self._load)
        self._intervals = deque([first], NUM_POINTS)
        self._latencies: deque[Latency] = deque(maxlen=NUM_LATENCIES)
        self._first_token, self._per_token = Bins(FIRST_TOKEN_BOUNDS), Bins(PER_TOKEN_BOUNDS)
        self._total, self._queue = Bins(TOTAL_BOUNDS), Bins(QUEUE_BOUNDS)
        self._prompt, self._answer = Bins(FIRST_TOKEN_BOUNDS), Bins(TOTAL_BOUNDS)
        self._inference = Bins(TOTAL_BOUNDS)
        self._inter_token, self._step = Bins(PER_TOKEN_BOUNDS), Bins(STEP_BOUNDS)
        self._prompt_lengths, self._answer_lengths = Bins(TOKEN_BOUNDS), Bins(TOKEN_BOUNDS)
        self._step_tokens = Bins(TOKEN_BOUNDS)

    def set_load(self, load: Load, counts: Counts | None = None) -> None:
        """From this moment on the load is another; `counts` are those up to now."""
        with self._lock:
            self._advance()
            self._load = load
            self._counts = counts or self._counts
            self._intervals[-1].rise(load)

    def add_step(
        self,
        num_prompt_tokens: int,
        num_new_tokens: int,
        *,
        num_tokens: int = 0,
        seconds: float | None = None,
        gaps: Sequence[float] = (),
    ) -> None:
        """A step computed so many prompt tokens and gave so many new ones.

        Args:
            num_tokens: all that it computed.
            seconds: that it took; None if it failed.
            gaps: seconds between each request's outputs, this step's and the one before.
        """
        with self._lock:
            if seconds is not None:
                self._step.add(seconds)
                self._step_tokens.add(num_tokens)
            self._inter_token.add_all(gaps)
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
            if usage is not None and usage.version:  # it had a step
                self._queue.add(usage.queue_seconds)
                self._prompt_lengths.add(usage.num_prompt_tokens)
                self._answer_lengths.add(usage.num_new_tokens)
            if usage is None or usage.num_new_tokens == 0:
                return
            decoding = usage.total_seconds - usage.first_token_seconds
            prompt = usage.first_token_seconds - usage.queue_seconds - usage.encoding_seconds
            self._prompt.add(prompt)
            self._answer.add(decoding)
            self._inference.add(prompt + decoding)
            per_token = decoding / (usage.num_new_tokens - 1) if usage.num_new_tokens > 1 else None
            self._latencies.append(Latency(self._clock.now(), usage.first_token_seconds, per_token))
            self._first_token.add(usage.first_token_seconds)
            self._total.add(usage.total_seconds)
            if per_token is not None:
                self._per_token.add(per_token)

    def read(self) -> Reading:
        """The figures of this moment."""
        distinct_experts = self._distinct_experts()
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
                self._queue.read(),
                self._prompt.read(),
                self._answer.read(),
                self._inference.read(),
                self._inter_token.read(),
                self._prompt_lengths.read(),
                self._answer_lengths.read(),
                self._step.read(),
                self._step_tokens.read(),
                distinct_experts,
                self._counts,
                self._speculation(),
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
