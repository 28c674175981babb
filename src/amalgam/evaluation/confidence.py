"""Confidence intervals: by resampling, the cluster bootstrap (Efron & Tibshirani 1993; Cameron et al. 2008), and of
shares that two groups have, by their scores (Wilson 1927; Newcombe 1998).

In: a value for each token, and which unit (document or window) each token belongs to. Out: `Interval`s. Tokens of one
unit depend on each other, so whole units are drawn. Must never know: what the values are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

MIN_UNITS = 10  # of fewer, an interval says nothing
LEVEL = 0.95
_MEAN_DRAWS, _QUANTILE_DRAWS = 2000, 200
_Z = 1.959963984540054  # of a standard normal, beyond which 1 - LEVEL lies

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate; `low` and `high` bound its 95% confidence interval, None where there are too few units."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_below_zero(self) -> bool:
        """With confidence."""
        return self.high is not None and self.high < 0


class Bootstrap:
    """Draws of units with replacement, the same for all that is asked of it, so that differences are paired."""

    def __init__(self, units: npt.NDArray[np.int64], seed: int = 0) -> None:
        """
        Args:
            units: `[tokens]`, each token's unit.
        """
        _, self._units = np.unique(units, return_inverse=True)
        self.num_units = int(self._units.max(initial=-1)) + 1
        self._seed = seed

    @cached_property
    def _draws(self) -> Floats:
        """`[draws, units]`: how often each unit is drawn."""
        generator = np.random.default_rng(self._seed)
        even = np.full(self.num_units, 1 / self.num_units)
        return generator.multinomial(self.num_units, even, size=_MEAN_DRAWS).astype(np.float64)

    @cached_property
    def _counts(self) -> Floats:
        return np.bincount(self._units, minlength=self.num_units).astype(np.float64)

    def mean(self, values: Floats) -> Interval:
        """Of a value for each token."""
        estimate = float(values.mean())
        if self.num_units < MIN_UNITS:
            return Interval(estimate)
        return _interval(estimate, self.means(values))

    def means(self, values: Floats) -> Floats:
        """The mean of each draw."""
        sums = np.bincount(self._units, values, self.num_units)
        return np.asarray((self._draws @ sums) / (self._draws @ self._counts))

    def ratio_of_means(self, first: Floats, second: Floats) -> Interval:
        """mean(first) / mean(second) - 1."""
        base = float(second.mean())
        if not base:
            return Interval(0.0)
        estimate = float(first.mean()) / base - 1
        if self.num_units < MIN_UNITS:
            return Interval(estimate)
        with np.errstate(divide="ignore", invalid="ignore"):
            return _interval(estimate, self.means(first) / self.means(second) - 1)

    def quantiles(self, values: Floats, shares: Sequence[float]) -> list[Interval]:
        """The value below which each share of the tokens lies."""
        order = np.argsort(values, kind="stable")
        ordered, units = values[order], self._units[order]
        estimates = [float(value) for value in _quantiles(ordered, np.ones(len(values)), shares)]
        if self.num_units < MIN_UNITS:
            return [Interval(value) for value in estimates]
        draws = [_quantiles(ordered, weights[units], shares) for weights in self._draws[:_QUANTILE_DRAWS]]
        columns = np.array(draws).T
        return [_interval(value, column) for value, column in zip(estimates, columns, strict=True)]


def ratio_of_groups(first: Floats, second: Floats, seed: int = 0) -> Interval:
    """mean(first) / mean(second) of two groups that have nothing to do with each other, a unit for each value."""
    if not len(first) or not len(second) or not second.mean():
        return Interval(math.nan)
    estimate = float(first.mean() / second.mean())
    if min(len(first), len(second)) < MIN_UNITS:
        return Interval(estimate)
    groups = [Bootstrap(np.arange(len(each)), seed + index).means(each) for index, each in enumerate((first, second))]
    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(estimate, groups[0] / groups[1])


def difference_of_shares(first: tuple[int, int], second: tuple[int, int]) -> Interval:
    """The share of the first group less that of the second; Newcombe's method 10, which fits shares near 0 too.

    Args:
        first, second: how many of a group have what is counted, and its size.
    """
    if not first[1] or not second[1]:
        return Interval(math.nan)
    (share, low, high), (other, other_low, other_high) = (_wilson(*group) for group in (first, second))
    difference = share - other
    if min(first[1], second[1]) < MIN_UNITS:
        return Interval(difference)
    below, above = math.hypot(share - low, other_high - other), math.hypot(high - share, other - other_low)
    return Interval(difference, difference - below, difference + above)


def _wilson(count: int, size: int) -> tuple[float, float, float]:
    """A share and the bounds of its score interval."""
    share, square = count / size, _Z**2
    middle = (count + square / 2) / (size + square)
    half = _Z / (size + square) * math.sqrt(count * (size - count) / size + square / 4)
    return share, max(0.0, middle - half), min(1.0, middle + half)


def _quantiles(ordered: Floats, weights: Floats, shares: Sequence[float]) -> Floats:
    reached = np.cumsum(weights)
    places = np.searchsorted(reached, np.array(shares) * reached[-1], side="left")
    return np.asarray(ordered[np.minimum(places, len(ordered) - 1)])


def _interval(estimate: float, draws: Floats) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return Interval(estimate, float(low), float(high))
