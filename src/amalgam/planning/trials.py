"""A candidate beside the weights in use, on live requests: what is held against limits, and the verdict.

In: figures of both. Out: `Check`s and a `Verdict`. Must never know: threads, clocks, requests, what goes live.

A check passes or fails only with 95% confidence; in between it is open, and more requests will tell. One that fails
rejects the candidate at once, since clients may be harmed. To promote it, all have to pass, on enough requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from amalgam.base.counting import counted
from amalgam.evaluation.confidence import Interval, difference_of_shares, ratio_of_groups
from amalgam.planning.trial_plans import CanaryLimits, ShadowLimits

if TYPE_CHECKING:
    from amalgam.planning.shadow import Compared

Outcome = Literal["promote", "reject", "undecided"]


@dataclass(frozen=True)
class Check:
    """A figure and its limit.

    Attributes:
        is_most: the figure may be at most the limit; otherwise at least.
    """

    name: str
    value: Interval
    limit: float
    is_most: bool = True

    @property
    def outcome(self) -> Literal["pass", "fail", "open"]:
        low, high = self.value.low, self.value.high
        if low is None or high is None or math.isnan(low) or math.isnan(high):
            return "open"
        if not self.is_most:
            low, high = -high, -low
        limit = self.limit if self.is_most else -self.limit
        return "pass" if high <= limit else "fail" if low > limit else "open"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "outcome": self.outcome}

    def __str__(self) -> str:
        sign = "≤" if self.is_most else "≥"
        if self.value.low is None or self.value.high is None:
            return f"{self.name} {self.value.value:.4g} ({sign} {self.limit:g})"
        bounds = f"95%: {self.value.low:.4g} to {self.value.high:.4g}"
        return f"{self.name} {self.value.value:.4g} ({bounds}; {sign} {self.limit:g})"


@dataclass(frozen=True)
class Verdict:
    """What to do with a candidate, and a sentence with the figures."""

    outcome: Outcome
    reason: str


def decide(checks: Sequence[Check], num_requests: int, min_requests: int) -> Verdict:
    """
    Args:
        num_requests: that the candidate has answered, or was compared on.
    """
    failed = [check for check in checks if check.outcome == "fail"]
    if failed:
        return Verdict("reject", f"{'; '.join(map(str, failed))}: beyond the limit.")
    if num_requests < min_requests:
        return Verdict("undecided", f"{counted(num_requests, 'request')}, {min_requests} are needed.")
    still_open = [check for check in checks if check.outcome == "open"]
    if still_open:
        return Verdict("undecided", f"{'; '.join(map(str, still_open))}: more requests will tell.")
    return Verdict("promote", f"{'; '.join(map(str, checks))}: within the limits.")


@dataclass(frozen=True)
class Arm:
    """What some weights did for the requests that ran on them.

    Attributes:
        num_errors: of the requests.
        first_token_seconds, token_seconds: of requests that have told: from arrival to the first token, and between
            two tokens on the mean.
    """

    num_requests: int
    num_errors: int
    num_tokens: int
    first_token_seconds: tuple[float, ...]
    token_seconds: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.num_requests,
            "errors": self.num_errors,
            "tokens": self.num_tokens,
            "first_token_seconds": _mean(self.first_token_seconds),
            "token_seconds": _mean(self.token_seconds),
        }


def canary_checks(now: Arm, candidate: Arm, limits: CanaryLimits) -> list[Check]:
    """Errors, and times if they are limited."""
    errors = [(arm.num_errors, arm.num_requests) for arm in (candidate, now)]
    checks = [Check("error_increase", difference_of_shares(errors[0], errors[1]), limits.max_error_increase)]
    if limits.max_slowdown is not None:
        checks.append(Check("slowdown", slowdown(now, candidate), limits.max_slowdown))
    return checks


def slowdown(now: Arm, candidate: Arm) -> Interval:
    """How many times as long a token takes, as clients feel it: their requests shared the engine with others."""
    return ratio_of_groups(np.array(candidate.token_seconds), np.array(now.token_seconds))


def shadow_checks(compared: Compared, limits: ShadowLimits) -> list[Check]:
    """Divergence and agreement, and times if they are limited."""
    checks = [
        Check("divergence", compared.divergence, limits.max_divergence),
        Check("agreement", compared.agreement, limits.min_agreement, is_most=False),
    ]
    if limits.max_slowdown is not None:
        checks.append(Check("slowdown", compared.token_time.ratio, limits.max_slowdown))
    return checks


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
