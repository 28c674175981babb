"""When a plan follows the traffic, and when it does not: with made-up measurements."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from amalgam.errors import PlanError
from amalgam.evaluation.confidence import Interval
from amalgam.planning.following import (
    Candidate,
    Drift,
    Limits,
    Proposer,
    Shadowed,
    after_shadowing,
    before_proposing,
    before_shadowing,
    drift_of,
    explain,
    swaps_within_hour,
)
from amalgam.planning.problem import Item, Option, Problem
from amalgam.planning.sensitivity import OptionError, Sensitivities, WeightErrors
from amalgam.planning.use import Use
from tests.errors import raises

LIMITS = Limits("memory", 1000.0, 5000, 256, 0.02, 0.05, 2)
BETTER = Candidate((1, 0), expected=0.5, expected_now=1.0, cost=1000.0, memory_bytes=1000)


def shadowed(now: float, new: float, low: float | None, high: float | None) -> Shadowed:
    ratio = new / now - 1
    return Shadowed("base", 4000, 40, Interval(now), Interval(new), Interval(ratio, low, high), 1.0)


@pytest.mark.parametrize(
    ("drift", "outcome"),
    [
        (Drift(255, 0.5, None), "few_tokens"),
        (Drift(256, 0.0, None), None),  # nobody knows what the plan in force was made for
        (Drift(256, 0.5, 0.019), "no_drift"),  # it was made for this traffic already
        (Drift(256, 0.5, 0.02), None),
    ],
)
def test_a_plan_is_looked_for_when_the_use_has_drifted(drift: Drift, outcome: str | None) -> None:
    found = before_proposing(drift, LIMITS)
    assert (None if found is None else found.outcome) == outcome


def test_drift_is_a_divergence_of_the_uses() -> None:
    verse, code = np.array([[90, 10], [50, 50]]), np.array([[10, 90], [50, 50]])
    same = drift_of(verse, verse, verse, 100)
    assert same.from_long == same.from_planned == 0
    moved = drift_of(code, verse + code, verse, 100)
    assert moved.from_planned is not None and moved.from_long is not None
    assert 0 < moved.from_long < moved.from_planned < 1
    assert drift_of(code, verse, None, 100).from_planned is None


@pytest.mark.parametrize(
    ("changes", "state", "outcome"),
    [
        ({}, {}, None),
        ({"choice": (0, 1)}, {}, "same_plan"),
        ({"cost": 1000.5}, {}, "over_budget"),
        ({"expected": 0.96}, {}, "small_expected_gain"),
        ({"expected": math.nan}, {}, "small_expected_gain"),
        ({"expected_now": 0.0}, {}, "small_expected_gain"),
        ({}, {"is_frozen": True}, "frozen"),
        ({}, {"swaps": [6400.0, 6500.0]}, "swap_cap"),
        ({}, {"swaps": [100.0, 6500.0]}, None),  # the first is more than an hour ago
        ({}, {"transient_bytes": 5001}, "no_memory"),
    ],
)
def test_what_keeps_a_candidate_from_being_measured(
    changes: dict[str, float], state: dict[str, object], outcome: str | None
) -> None:
    arguments = {"swaps": [], "is_frozen": False, "transient_bytes": 5000} | state
    swaps = arguments.pop("swaps")
    found = before_shadowing(replace(BETTER, **changes), (0, 1), LIMITS, swaps, 7000.0, **arguments)  # type: ignore[arg-type]
    assert (None if found is None else found.outcome) == outcome


@pytest.mark.parametrize(
    ("measured", "outcome"),
    [
        (shadowed(0.02, 0.01, -0.6, -0.4), "committed"),
        (shadowed(0.02, 0.0192, -0.05, -0.03), "not_better"),  # better, but by too little: hysteresis
        (shadowed(0.02, 0.01, -0.9, 0.1), "not_better"),  # by enough, but perhaps by chance
        (shadowed(0.02, 0.03, 0.4, 0.6), "not_better"),
        (shadowed(0.02, 0.01, None, None), "few_requests"),
        (shadowed(0.02, math.nan, -0.6, -0.4), "not_finite"),
        (shadowed(math.inf, 0.01, -0.6, -0.4), "not_finite"),
    ],
)
def test_what_is_measured_decides(measured: Shadowed, outcome: str) -> None:
    assert after_shadowing(measured, LIMITS, is_frozen=False).outcome == outcome
    expected = "frozen" if outcome == "committed" else outcome
    assert after_shadowing(measured, LIMITS, is_frozen=True).outcome == expected


def test_changes_are_counted_within_an_hour() -> None:
    assert swaps_within_hour([0, 1, 3600, 3601], 3601.0) == 2


def problem() -> Problem:
    """Two experts of one layer, narrow or wide; and the embedding, of which nothing was measured."""
    options = (Option("int4", "int4", 400, 400), Option("base", "bf16", 1600, 1600))
    items = [
        Item(f"e{expert}", f"layers.0.mlp.experts.{expert}.up", "expert", "up", 0, expert, 800, options)
        for expert in range(2)
    ]
    items.append(Item("embedding", "embedding", "embedding", "embedding", None, None, 800, options))
    return Problem(tuple(items), 10, 10, ("int4", "base"), {})


@pytest.fixture
def proposer() -> Proposer:
    errors = WeightErrors(100, 50.0, {"int4": OptionError(0.1, 0.1, 0.1), "base": OptionError(0.0, 0.0, 0.0)})
    return Proposer(problem(), Sensitivities(100, {"e0": errors, "e1": errors}))


def use(first: float) -> Use:
    mass = {(0, 0): first, (0, 1): 1 - first}
    return Use("live", 1000, mass, mass)


def test_a_candidate_follows_the_use_within_the_budget_and_leaves_what_was_not_measured(proposer: Proposer) -> None:
    limits = replace(LIMITS, budget_bytes=1600.0 + 400 + 1600)
    now = (1, 0, 1)
    assert proposer.propose(use(0.9), now, limits).choice == now
    found = proposer.propose(use(0.1), now, limits)
    assert found.choice == (0, 1, 1) and found.cost == 3600 and found.memory_bytes == 3610
    assert 0.8 < found.expected_gain < 1
    assert proposer.propose(use(0.1), (1, 0, 0), limits).choice == (1, 1, 0)
    with raises(PlanError):
        proposer.propose(use(0.1), now, replace(LIMITS, budget_bytes=2300.0))


def test_an_expert_is_explained_by_what_the_next_steps_would_do(proposer: Proposer) -> None:
    (found,) = explain(proposer, use(0.1), (1, 0, 1), 0, 1)
    assert found["source"] == "int4" and found["step_down"] is None
    assert found["step_up"] == {"source": "base", "bytes": 1200, "divergence": -found["divergence"]}
    assert found["divergence"] > 0 and (found["rank_for_more"], found["num_ranked"]) == (1, 1)
    (wide,) = explain(proposer, use(0.1), (1, 0, 1), 0, 0)
    assert wide["step_up"] is None and wide["step_down"]["bytes"] == -1200 and wide["step_down"]["divergence"] > 0
    assert explain(proposer, use(0.1), (1, 0, 1), 0, 7) == []
