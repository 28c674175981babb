"""Choices are the best there are, with bounds that hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from amalgam.errors import PlanError
from amalgam.planning.knapsack import solve
from tests.errors import raises


def best_of_all(loss: np.ndarray, cost: np.ndarray, budget: float) -> float:
    """By trying them."""
    found = np.inf
    for choice in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        rows = range(len(loss))
        if cost[rows, choice].sum() <= budget:
            found = min(found, loss[rows, choice].sum())
    return float(found)


@pytest.mark.parametrize("seed", range(25))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    loss = generator.exponential(size=(6, 4))
    cost = generator.integers(1, 40, (6, 4)).astype(float)
    least, most = cost.min(axis=1).sum(), cost.max(axis=1).sum()
    budget = float(least + generator.random() * (most - least))
    found = solve(loss, cost, budget, gap=1e-9)
    assert found.cost <= budget
    assert found.loss == pytest.approx(best_of_all(loss, cost, budget), abs=1e-9)
    assert found.bound <= found.loss + 1e-12 and found.gap < 1e-6


def test_options_that_do_not_exist_are_not_chosen() -> None:
    loss = np.array([[1.0, 0.0, np.inf], [2.0, np.inf, np.inf]])
    cost = np.array([[1.0, 2.0, np.inf], [1.0, np.inf, np.inf]])
    assert solve(loss, cost, 100.0).choice.tolist() == [1, 0]


def test_a_budget_below_the_smallest_plan_is_refused() -> None:
    with raises(PlanError, "3", "2"):
        solve(np.ones((3, 2)), np.array([[1.0, 2.0]] * 3), 2.0)


def test_a_large_model_is_planned_with_a_certificate() -> None:
    """The projections of Qwen3-235B's experts, in eight formats each."""
    generator = np.random.default_rng(0)
    bits = np.array([2.25, 2.5, 3.25, 4.125, 4.25, 4.5, 6.0, 8.25])
    scale = generator.lognormal(0, 2, 36_096)[:, None]
    loss = scale * 4.0 ** -bits[None] * generator.lognormal(0, 0.1, (36_096, 8))
    cost = np.tile(bits * 1536 * 4096 / 8, (36_096, 1)).round()
    found = solve(loss, cost, 36_096 * 4.5 * 1536 * 4096 / 8)
    assert found.gap < 1e-4
    even = loss[:, 5].sum()  # 4.5 bits for all
    assert found.loss < 0.5 * even
