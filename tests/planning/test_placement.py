"""Sources and devices together: the best of all where all can be tried, quality before speed, experts in one piece."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import highspy
import numpy as np
import pytest

from amalgam.errors import PlanError
from amalgam.planning import knapsack, placement
from amalgam.planning.knapsack import Allowance
from amalgam.planning.lagrangian import Capacity, Problem, minimise, taken
from amalgam.planning.placement import Place, can_hold, place, place_chosen
from tests.errors import raises

GROUPS = np.array([0, 0, 1, 1, 2, 3])


def random_problem(seed: int) -> Problem:
    """Four groups on two places, with a capacity of each and one of both; the last item has one place."""
    generator = np.random.default_rng(seed)
    shape = (len(GROUPS), 2, 3)
    value, cost = generator.exponential(size=shape), generator.integers(1, 40, shape).astype(float)
    value[5, 1] = np.inf
    capacities = []
    for index in range(2):
        own = np.zeros(shape)
        own[:, index] = cost[:, index]
        capacities.append(Capacity(own, float(generator.integers(20, 90))))
    capacities.append(Capacity(generator.exponential(size=shape), float(generator.uniform(2, 7))))
    return Problem(value, capacities, GROUPS)


def best_of_all(problem: Problem) -> float:
    """By trying them."""
    items, places, options = problem.value.shape
    of_items = np.array(list(itertools.product(range(options), repeat=items)))
    rows = np.arange(items)
    best = np.inf
    for of_groups in itertools.product(range(places), repeat=problem.num_groups):
        where = np.array(of_groups)[problem.groups]
        value = problem.value[rows, where, of_items].sum(axis=1)
        fits = np.all([c.cost[rows, where, of_items].sum(axis=1) <= c.limit for c in problem.capacities], axis=0)
        best = min(best, value[fits].min(initial=np.inf))
    return float(best)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    problem = random_problem(seed)
    best = best_of_all(problem)
    if best == np.inf:
        with raises(PlanError):
            minimise(problem, gap=1e-9)
        return
    found = minimise(problem, gap=1e-9)
    assert found.value == pytest.approx(best, abs=1e-9) and found.bound <= best + 1e-9
    assert found.places.tolist() == [found.places[np.flatnonzero(GROUPS == group)[0]] for group in GROUPS]
    for capacity in problem.capacities:
        assert taken(capacity.cost, found.places, found.options) <= capacity.limit * (1 + 1e-9)


def layers(
    num_experts: int, limits: tuple[float, float], seed: int = 0
) -> tuple[np.ndarray, list[Place], np.ndarray, np.ndarray]:
    """Experts of three weights in four formats, the first of which is dense and on the card only: losses, places,
    groups, use."""
    generator = np.random.default_rng(seed)
    use = np.repeat(generator.dirichlet(np.full(num_experts, 0.7)), 3)
    bits = np.array([2.5, 4.25, 6.0, 8.25])
    losses = use[:, None] * generator.lognormal(0, 1, (len(use), 1)) * 4.0 ** -bits[None]
    memory = np.tile(bits * 1000, (len(use), 1))
    groups = np.repeat(np.arange(num_experts), 3)
    far = memory.copy()
    far[:3] = np.inf
    seconds = use[:, None] * memory
    places = [Place("cuda", limits[0], memory, seconds / 1000), Place("cpu", limits[1], far, seconds / 80)]
    return losses, places, groups, use


def test_quality_comes_first_and_the_used_experts_lie_on_the_card() -> None:
    losses, places, groups, use = layers(40, (1.6e5, 3.8e5))
    found = place(losses, places, groups, slack=0.05, limit=1.0)
    rows = np.arange(len(groups))
    for index, each in enumerate(places):
        here = found.places == index
        assert each.memory[rows, found.options][here].sum() <= each.limit
    assert (found.places.reshape(-1, 3) == found.places[::3, None]).all(), "experts are not torn apart"
    assert (found.places[:3] == 0).all(), "what is dense has no choice"
    assert found.loss <= 1.051 * found.loss_bound
    assert found.seconds_bound <= found.seconds
    assert use[found.places == 0].mean() > 3 * use[found.places == 1].mean()

    faster = place(losses, places, groups, slack=0.8, limit=1.0)
    assert faster.seconds < found.seconds and found.loss < faster.loss <= 1.81 * faster.loss_bound


def test_the_solver_is_asked_several_times_and_takes_no_more_than_it_may_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock on which each question takes two seconds."""
    granted: list[float] = []

    class Clocked(Allowance):
        def run(self, solver: highspy.Highs) -> None:
            granted.append(self.left)
            super().run(solver)

    ticks = itertools.count(0.0, 2.0)
    monkeypatch.setattr(knapsack, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr(placement, "Allowance", Clocked)
    losses, places, groups, _ = layers(40, (1.6e5, 3.8e5))
    place(losses, places, groups, slack=0.05, limit=5.0)
    starts = [index for index, left in enumerate(granted) if left == 5.0]
    assert len(starts) == 2 and starts[0] == 0 and len(granted) > 3
    for first, end in zip(starts, [*starts[1:], len(granted)], strict=True):
        assert granted[first:end] == [5.0 - 2.0 * index for index in range(end - first)]
    solver = knapsack.silent_solver()
    Clocked(-3.0).run(solver)
    assert solver.getOptionValue("time_limit")[1] == pytest.approx(0.2)


def test_where_sources_are_chosen_the_most_used_lie_on_the_card() -> None:
    _, places, groups, use = layers(60, (3e5, 6e5))
    options = [1] * len(groups)
    found = place_chosen(options, places, groups)
    assert found.options.tolist() == options
    on_card = found.places[::3] == 0
    # All take the same bytes, so that no other set of as many saves more.
    free = np.arange(60) > 0
    assert use[::3][on_card & free].min() >= use[::3][~on_card].max()
    assert on_card.sum() == 3e5 // (3 * 4250)
    assert can_hold(options, places, groups) and not can_hold([3] * len(groups), places, groups)


def test_what_does_not_fit_is_refused() -> None:
    losses, places, groups, _ = layers(20, (7e4, 7e4))
    with raises(PlanError):
        place(losses, places, groups)
    with raises(PlanError):  # all of it would fit, but what is dense is larger than the card
        losses, places, groups, _ = layers(20, (7e3, 7e5))
        place(losses, places, groups)
