"""How often each expert was used, in total and over time, in bounded memory.

In: tallies and the time. Out: the tallies of a stretch of time. Must never know torch or requests. Not locked:
`ExpertTracker` calls it under its own lock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

NUM_PHASES = 2
PROMPT, GENERATED = range(NUM_PHASES)

BUCKETS_PER_WIDTH = 48


@dataclass(frozen=True)
class Tally:
    """Everything counted over some stretch of time, per phase (prompt, generated) where that makes a difference.

    The arrays are int64 and float64 while they are added to; `compact` halves them for keeping.
    """

    counts: npt.NDArray[np.integer]  # [phases, layers, experts]
    gate_mass: npt.NDArray[np.floating]  # [phases, layers, experts]: sum of gate weights
    num_tokens: npt.NDArray[np.int64]  # [phases]
    num_requests: npt.NDArray[np.int64]  # []

    @classmethod
    def zeros(cls, num_layers: int, num_experts: int) -> Tally:
        grid = (NUM_PHASES, num_layers, num_experts)
        return cls(np.zeros(grid, np.int64), np.zeros(grid), np.zeros(NUM_PHASES, np.int64), np.zeros((), np.int64))

    def add(self, other: Tally) -> None:
        """Add `other` in place."""
        for mine, theirs in zip(self._arrays, other._arrays, strict=True):
            np.add(mine, theirs, out=mine, casting="same_kind")

    def copy(self) -> Tally:
        return Tally(*(array.copy() for array in self._arrays))

    def compact(self) -> Tally:
        """A copy in uint32 and float32."""
        return Tally(
            self.counts.astype(np.uint32), self.gate_mass.astype(np.float32), self.num_tokens, self.num_requests
        )

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(np.asarray(a + b) for a, b in zip(self._arrays, other._arrays, strict=True)))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    @property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        return self.counts, self.gate_mass, self.num_tokens, self.num_requests


@dataclass(frozen=True)
class Bucket:
    """A tally of the ticks `[first, stop)`; closed ones are compact and never change."""

    first: int
    stop: int
    tally: Tally


class History:
    """Buckets of a tick's length that are merged as they age.

        age in ticks   0 ──── 48 ──────── 144 ──────────────── 336 ──────────── ...
        bucket width     1         2                4                  8

    The width is one tick, or at most a twenty-fourth of the age: a window may begin a little early, but memory grows
    with the logarithm of the time kept. With 5 s ticks an hour takes 192 buckets, not 720. Idle stretches take none.
    """

    def __init__(self, num_layers: int, num_experts: int, tick_seconds: float, kept_seconds: float) -> None:
        self._grid = (num_layers, num_experts)
        self._tick_seconds = tick_seconds
        self._kept_ticks = int(np.ceil(kept_seconds / tick_seconds))
        self._closed: list[Bucket] = []  # oldest first
        self._open: Bucket | None = None

    def tick(self, now: float) -> int:
        """The number of the tick that time `now` lies in."""
        return int(now // self._tick_seconds)

    def end_of_tick(self, now: float) -> float:
        """When the tick that time `now` lies in is over."""
        return (self.tick(now) + 1) * self._tick_seconds

    def at(self, now: float) -> Tally:
        """The tally that takes what happens at time `now` (seconds, never falling)."""
        tick = self.tick(now)
        if self._open is None or self._open.first < tick:
            if self._open is not None:
                closed = Bucket(self._open.first, self._open.stop, self._open.tally.compact())
                self._closed = self._merged([*self._closed, closed], tick)
            self._open = Bucket(tick, tick + 1, Tally.zeros(*self._grid))
        return self._open.tally

    def since(self, start: float) -> list[Bucket]:
        """The buckets that reach beyond time `start`, oldest first; the caller may keep them."""
        buckets = list(self._closed)
        if self._open is not None:
            buckets.append(Bucket(self._open.first, self._open.stop, self._open.tally.copy()))
        return [bucket for bucket in buckets if bucket.stop * self._tick_seconds > start]

    def start_of(self, bucket: Bucket) -> float:
        """When `bucket` begins, in seconds."""
        return bucket.first * self._tick_seconds

    def restore(self, buckets: Iterable[Bucket], tick_seconds: float, now: float) -> None:
        """Start with buckets of an earlier run, oldest first; those of the future and those too old are left out.

        Args:
            tick_seconds: length of their ticks; where ours are longer, a bucket is taken to begin a little early.
        """
        tick, scale = self.tick(now), tick_seconds / self._tick_seconds
        taken: list[Bucket] = []
        for bucket in buckets:
            first, stop = (math.floor(number * scale) for number in (bucket.first, bucket.stop))
            if first <= tick:
                # The present tick is still being added to, so that nothing else may reach into it.
                stop = tick + 1 if first == tick else min(max(stop, first + 1), tick)
                taken.append(Bucket(first, stop, bucket.tally.compact()))
        self._closed, self._open = self._merged(taken, tick), None
        if self._closed and self._closed[-1].first == tick:
            latest = self._closed.pop()
            self._open = Bucket(tick, tick + 1, Tally.zeros(*self._grid) + latest.tally)

    def clear(self) -> None:
        self._closed, self._open = [], None

    @property
    def nbytes(self) -> int:
        """Memory that the buckets hold."""
        return sum(bucket.tally.nbytes for bucket in (*self._closed, *filter(None, [self._open])))

    def _merged(self, buckets: Iterable[Bucket], tick: int) -> list[Bucket]:
        """`buckets` without those too old, and with neighbours merged that share a cell of their age's width."""
        result: list[Bucket] = []
        for bucket in buckets:
            age = max(tick - bucket.stop, 0)
            if age >= self._kept_ticks:
                continue
            width = 1 << ((age // BUCKETS_PER_WIDTH + 1).bit_length() - 1)
            if result and result[-1].first // width == bucket.first // width:
                older = result.pop()
                bucket = Bucket(older.first, bucket.stop, older.tally + bucket.tally)
            result.append(bucket)
        return result


class DecayingRate:
    """Activations per second, weighted by age: the weight halves every `half_life` seconds. Times in seconds."""

    def __init__(self, num_layers: int, num_experts: int, half_life: float, now: float) -> None:
        self._mean_life = half_life / np.log(2)
        self._started_at = self._latest = now
        self._weighted = np.zeros((num_layers, num_experts))

    def add(self, counts: npt.NDArray[np.integer], now: float) -> None:
        """Add what happened at time `now`, which never falls."""
        self._weighted *= np.exp((self._latest - now) / self._mean_life)
        self._weighted += counts
        self._latest = now

    def restore(self, rates: npt.NDArray[np.float64], now: float) -> None:
        """Go on from what `read` said at time `now`, somewhere else perhaps."""
        self._started_at, self._latest = -np.inf, now
        self._weighted = rates * self._mean_life

    def read(self, now: float) -> npt.NDArray[np.float64]:
        """The rate at time `now`; before much time has passed, the mean since the start."""
        fading = np.exp((self._latest - now) / self._mean_life)
        seen = -np.expm1((self._started_at - max(now, self._started_at + 1)) / self._mean_life)
        return np.asarray(self._weighted * fading / (self._mean_life * seen))


def moved(buckets: Iterable[Bucket], ticks: int) -> list[Bucket]:
    """`buckets` so many ticks later, or earlier if below 0; those from before the first tick are left out."""
    return [replace(b, first=b.first + ticks, stop=b.stop + ticks) for b in buckets if b.first + ticks >= 0]


def total(buckets: Iterable[Bucket], num_layers: int, num_experts: int) -> Tally:
    """The sum of `buckets`."""
    result = Tally.zeros(num_layers, num_experts)
    for bucket in buckets:
        result.add(bucket.tally)
    return result
