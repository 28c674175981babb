"""How often a quantity was how large, as Prometheus' histograms have it.

In: values. Out: `Histogram`. Must never know: of what.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Histogram:
    """Counts of values up to each bound, and their sum, as Prometheus has them but not yet cumulative."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]  # one more than bounds
    sum: float

    @property
    def mean(self) -> float | None:
        """None if there are no values."""
        count = sum(self.counts)
        return self.sum / count if count else None


class Bins:
    """A histogram in the making. Not thread-safe."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_all(self, values: Iterable[float]) -> None:
        bounds, counts = self._bounds, self._counts
        for value in values:
            counts[bisect.bisect_left(bounds, value)] += 1
            self._sum += value

    def read(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._sum)
