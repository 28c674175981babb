"""Intervals hold what they promise, on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from amalgam.evaluation.confidence import Bootstrap, Interval, difference_of_shares, ratio_of_groups


def clustered(generator: np.random.Generator, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """40 units of 20 tokens, whose values depend on their unit more than on the token."""
    centres = generator.normal(mean, 1.0, 40)
    return np.repeat(np.arange(40), 20), (centres[:, None] + generator.normal(0, 0.1, (40, 20))).ravel()


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        units, values = clustered(generator, 3.0)
        interval = Bootstrap(units, seed).mean(values)
        assert interval.low is not None and interval.high is not None and interval.low < interval.value < interval.high
        covered += interval.low <= 3.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99  # by tokens instead of units it would be a third


def test_differences_are_paired() -> None:
    """Two plans on one text: what the text does to both does not hide what differs."""
    units, values = clustered(np.random.default_rng(1), 3.0)
    bootstrap = Bootstrap(units)
    assert bootstrap.mean(values * 0.98 - values).is_below_zero
    ratio = bootstrap.ratio_of_means(values * 0.98, values)
    assert abs(ratio.value + 0.02) < 1e-9 and ratio.is_below_zero


def test_too_few_units_have_no_interval() -> None:
    interval = Bootstrap(np.array([0, 0, 1, 1])).mean(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (interval.value, interval.low, interval.high) == (2.5, None, None)
    assert not interval.is_below_zero


def test_quantiles_are_those_of_the_values() -> None:
    units = np.repeat(np.arange(50), 20)
    values = np.random.default_rng(2).exponential(size=1000)
    high, higher = Bootstrap(units).quantiles(values, (0.99, 0.999))
    assert sum(values <= high.value) == 990 and sum(values <= higher.value) == 999
    assert high.low is not None and high.high is not None and high.low <= high.value <= high.high


@pytest.mark.parametrize(
    ("first", "second", "low", "high"),  # Newcombe 1998, table II, method 10
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0000),
        ((0, 10), (0, 10), -0.2775, 0.2775),
    ],
)
def test_the_difference_of_two_shares(first: tuple[int, int], second: tuple[int, int], low: float, high: float) -> None:
    found = difference_of_shares(first, second)
    assert found.value == pytest.approx(first[0] / first[1] - second[0] / second[1])
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_the_ratio_of_two_groups_that_share_nothing() -> None:
    generator = np.random.default_rng(1)
    first, second = generator.normal(3.0, 1.0, 400), generator.normal(2.0, 1.0, 200)
    found = ratio_of_groups(first, second)
    assert found.value == first.mean() / second.mean()
    assert found.low is not None and found.high is not None
    assert found.low < 1.5 < found.high and found.high - found.low < 0.35
    assert ratio_of_groups(first[:9], second) == Interval(first[:9].mean() / second.mean())
    assert math.isnan(ratio_of_groups(first, second[:0]).value)
