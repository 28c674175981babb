"""What is held against limits with confidence, and the verdicts that come of it."""

from __future__ import annotations

import pytest

from amalgam.evaluation.confidence import Interval
from amalgam.planning.trial_plans import CanaryLimits
from amalgam.planning.trials import Arm, Check, canary_checks, decide


@pytest.mark.parametrize(
    ("value", "is_most", "outcome"),
    [
        (Interval(0.04, 0.03, 0.05), True, "pass"),
        (Interval(0.04, 0.03, 0.06), True, "open"),
        (Interval(0.07, 0.06, 0.08), True, "fail"),
        (Interval(0.07, 0.06, 0.08), False, "pass"),
        (Interval(0.04, 0.03, 0.04), False, "fail"),
        (Interval(0.9), True, "open"),  # too few units for an interval
        (Interval(float("nan"), float("nan"), float("nan")), True, "open"),
    ],
)
def test_a_check_passes_or_fails_with_confidence_only(value: Interval, is_most: bool, outcome: str) -> None:
    assert Check("figure", value, 0.05, is_most).outcome == outcome


def test_a_candidate_is_promoted_when_all_checks_pass_on_enough_requests() -> None:
    good, bad = Check("good", Interval(0.0, -0.1, 0.01), 0.05), Check("bad", Interval(0.2, 0.1, 0.3), 0.05)
    unclear = Check("unclear", Interval(0.05, 0.0, 0.1), 0.05)
    assert decide([good], 100, 100).outcome == "promote"
    assert decide([good], 99, 100).outcome == "undecided"
    assert decide([good, unclear], 100, 100).outcome == "undecided"
    assert decide([good, bad], 10, 100).outcome == "reject"  # clients may be harmed: at once
    assert "bad 0.2" in decide([good, bad], 10, 100).reason


def arm(num_requests: int, num_errors: int = 0, token_seconds: float = 0.01) -> Arm:
    times = tuple(token_seconds * (1 + index % 3 / 10) for index in range(num_requests - num_errors))
    return Arm(num_requests, num_errors, 8 * num_requests, times, times)


@pytest.mark.parametrize(
    ("now", "candidate", "outcome"),
    [
        (arm(900), arm(100), "promote"),
        (arm(900), arm(20), "undecided"),
        (arm(900), arm(100, num_errors=2), "undecided"),  # 2% with an interval that reaches beyond 5%
        (arm(900), arm(100, num_errors=30), "reject"),
        (arm(900, num_errors=270), arm(100, num_errors=30), "undecided"),  # as many fail on the current weights
        (arm(900), arm(100, token_seconds=0.02), "reject"),
        (arm(0), arm(100), "undecided"),  # nothing to compare with
    ],
)
def test_errors_and_times_of_a_canary(now: Arm, candidate: Arm, outcome: str) -> None:
    limits = CanaryLimits(min_requests=50, max_slowdown=1.3)
    assert decide(canary_checks(now, candidate, limits), candidate.num_requests, 50).outcome == outcome
