"""A candidate beside the weights in use, on live requests: what is asked for, and its limits.

What the figures say of them is decided in `trials`; the server reads this without numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["canary", "shadow"]
Which = Literal["current", "candidate"]
WHICH: tuple[Which, Which] = ("current", "candidate")


@dataclass(frozen=True)
class CanaryLimits:
    """
    Attributes:
        min_requests: that the candidate has to answer before it can be promoted.
        max_error_increase: share of requests that may fail beyond what fails on the weights in use.
        max_slowdown: times as long as on the weights in use that a token may take; None: whatever it takes.
    """

    min_requests: int = 100
    max_error_increase: float = 0.05
    max_slowdown: float | None = None


@dataclass(frozen=True)
class ShadowLimits:
    """
    Attributes:
        min_requests: on which both have to be compared before the candidate can be promoted.
        max_divergence: KL(weights in use ‖ candidate), nats a token.
        min_agreement: share of tokens for which both have the same likeliest one.
        max_slowdown: times as much of a core's time as on the weights in use that a token may take; None: any.
    """

    min_requests: int = 50
    max_divergence: float = 0.05
    min_agreement: float = 0.9
    max_slowdown: float | None = None


@dataclass(frozen=True)
class CanaryPlan:
    """
    Attributes:
        weights: name or id of the candidate.
        share: of the requests that run on it.
        is_automatic: the verdict is carried out, as soon as there is one.
    """

    weights: str | int
    share: float = 0.05
    limits: CanaryLimits = field(default_factory=CanaryLimits)
    is_automatic: bool = False


@dataclass(frozen=True)
class ShadowPlan:
    """
    Attributes:
        weights, is_automatic: as for a canary.
        share: of the requests that are compared.
        max_requests: that are compared in all.
        max_tokens: of a request that are computed; those with longer prompts are left out.
        max_share: most of one core's time that comparing takes.
    """

    weights: str | int
    share: float = 0.1
    limits: ShadowLimits = field(default_factory=ShadowLimits)
    is_automatic: bool = False
    max_requests: int = 200
    max_tokens: int = 1024
    max_share: float = 0.25
