"""Whether a plan should follow the traffic: drift, a candidate, and the decision about it.

In: counts of two windows, sensitivities, measured divergences. Out: a `Candidate`, a `Decision` with its figures.
Must never know: threads, clocks, weights in memory, what goes live.

Four things guard the change. Drift: without it, nothing is tried. A minimum gain, expected and then measured with
confidence, so that two plans of the same worth do not take turns (hysteresis). A cap on changes in any hour. And two
limits of bytes: of the plan, and of all weights in memory while the old ones, the new ones and the reference are there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from amalgam.base.counting import counted
from amalgam.evaluation.confidence import Interval
from amalgam.experts.comparison import jensen_shannon, mean_or_none
from amalgam.planning.knapsack import solve
from amalgam.planning.losses import Floats, costs, losses
from amalgam.planning.problem import Problem
from amalgam.planning.sensitivity import Sensitivities
from amalgam.planning.use import Use

HOUR = 3600.0
SETTLED = ("same_plan", "small_expected_gain", "not_better", "committed")  # for this use; until it drifts
QUIET = ("few_tokens", "no_drift")  # nothing has happened
FAILED = ("failed", "not_finite")

Outcome = Literal[
    "frozen", "few_tokens", "no_drift", "same_plan", "small_expected_gain", "swap_cap", "over_budget", "no_memory",
    "few_requests", "not_finite", "not_better", "overtaken", "failed", "committed",
]  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What a change of the plan has to keep to.

    Attributes:
        budget_bytes: of the weights of a plan that have a choice, in the unit of `budget_kind`.
        memory_bytes: of all weights in memory, while versions and the reference overlap.
    """

    budget_kind: Literal["memory", "stored"]
    budget_bytes: float
    memory_bytes: int
    min_tokens: int
    drift: float
    min_gain: float
    max_swaps_per_hour: int


@dataclass(frozen=True)
class Drift:
    """How far the short window's use lies from other uses, in bits, the mean over the layers; None: not known.

    Attributes:
        from_long: from the long window's.
        from_planned: from the use that the plan in force was made for, or found good for. While that is not known,
            a plan is looked for.
    """

    num_tokens: int
    from_long: float | None
    from_planned: float | None


def drift_of(
    short: npt.NDArray[Any], long: npt.NDArray[Any], planned: npt.NDArray[Any] | None, num_tokens: int
) -> Drift:
    """
    Args:
        short, long, planned: activations `[layers, experts]`; those of the plan's own traffic, None if there was none.
    """
    from_planned = None if planned is None else mean_or_none(jensen_shannon(short, planned))
    return Drift(num_tokens, mean_or_none(jensen_shannon(short, long)), from_planned)


@dataclass(frozen=True)
class Candidate:
    """A plan for the traffic as it is.

    Attributes:
        choice: an option of each item.
        expected: loss in nats a token, by sensitivities and use.
        expected_now: of the plan in force, with the same use.
        cost: in the unit of the budget.
    """

    choice: tuple[int, ...]
    expected: float
    expected_now: float
    cost: float
    memory_bytes: int

    @property
    def expected_gain(self) -> float:
        """Share of the expected loss that it removes."""
        return 1.0 - self.expected / self.expected_now if self.expected_now > 0 else 0.0


class Proposer:
    """Chooses for a use; keeps what does not depend on it.

    Weights without sensitivities stay as they are.
    """

    def __init__(self, problem: Problem, sensitivities: Sensitivities) -> None:
        self.problem = problem
        self.digest = sensitivities.digest
        self._sensitivities = sensitivities
        self._costs = {kind: costs(problem, kind) for kind in ("memory", "stored")}
        self._rows = np.arange(len(problem.items))
        self._is_measured = np.array([item.name in sensitivities.weights for item in problem.items])

    def losses(self, use: Use) -> Floats:
        """Of every option, `[items, options]` in nats a token."""
        return losses(self.problem, self._sensitivities, use)

    def cost(self, choice: Sequence[int], kind: str) -> float:
        return float(self._costs[kind][self._rows, np.asarray(choice)].sum())

    def propose(self, use: Use, now: Sequence[int], limits: Limits) -> Candidate:
        """
        Raises:
            PlanError: no plan keeps the budget.
        """
        found, cost = self.losses(use), self._costs[limits.budget_kind]
        chosen = np.asarray(now)
        allowed = found.copy()
        fixed = ~self._is_measured
        allowed[fixed] = np.inf
        allowed[fixed, chosen[fixed]] = 0.0
        solution = solve(allowed, np.where(np.isfinite(allowed), cost, np.inf), limits.budget_bytes)
        choice = tuple(int(index) for index in solution.choice)
        return Candidate(
            choice,
            float(found[self._rows, np.asarray(choice)].sum()),
            float(found[self._rows, chosen].sum()),
            self.cost(choice, limits.budget_kind),
            self.problem.fixed_memory + self.problem.memory_bytes(choice),
        )


@dataclass(frozen=True)
class Shadowed:
    """Two plans measured on the same live traffic.

    Attributes:
        now, candidate: KL divergence from the reference, nats a token.
        difference: candidate / now - 1.
        reference: what they were compared with.
    """

    reference: str
    num_tokens: int
    num_requests: int
    now: Interval
    candidate: Interval
    difference: Interval
    seconds: float


@dataclass(frozen=True)
class Decision:
    """What came of one look at the traffic.

    Attributes:
        at: Unix seconds.
        reason: a sentence with the figures.
        num_changed: weights that the candidate takes from elsewhere.
    """

    at: float
    outcome: Outcome
    reason: str
    drift: Drift
    candidate_bytes: int | None = None
    num_changed: int | None = None
    expected_gain: float | None = None
    shadowed: Shadowed | None = None
    version: int | None = None

    @property
    def is_proposal(self) -> bool:
        """Whether there was a plan to decide about."""
        return self.candidate_bytes is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing is tried before the use drifts: the same candidate would fail again."""
        return self.outcome in SETTLED or (self.outcome in FAILED and self.is_proposal)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """An outcome and its sentence."""

    outcome: Outcome
    reason: str


def before_proposing(drift: Drift, limits: Limits) -> Verdict | None:
    """Why no plan is looked for; None: one is."""
    if drift.num_tokens < limits.min_tokens:
        return Verdict(
            "few_tokens", f"{counted(drift.num_tokens, 'token')} in the short window, {limits.min_tokens} are needed."
        )
    if drift.from_planned is not None and drift.from_planned < limits.drift:
        return Verdict("no_drift", f"The use has drifted by {drift.from_planned:.4f}, {limits.drift:g} are needed.")
    return None


def before_shadowing(
    candidate: Candidate,
    now: Sequence[int],
    limits: Limits,
    swaps: Sequence[float],
    at: float,
    *,
    is_frozen: bool,
    transient_bytes: int,
) -> Verdict | None:
    """Why a candidate is not measured; None: it is.

    Args:
        swaps: when weights were changed, in seconds of the clock of `at`.
        transient_bytes: all weights in memory while it is measured: versions in use, the candidate's, the reference's.
    """
    if candidate.choice == tuple(now):
        return Verdict("same_plan", "The plan in force is the best for this traffic too.")
    if candidate.cost > limits.budget_bytes:
        return Verdict("over_budget", f"It takes {candidate.cost:,.0f} bytes of {limits.budget_bytes:,.0f}.")
    if not candidate.expected_gain >= limits.min_gain:  # NaN is not
        return Verdict(
            "small_expected_gain",
            f"It is expected to remove {candidate.expected_gain:.1%} of the divergence, {limits.min_gain:.1%} are "
            "needed.",
        )
    if is_frozen:
        return Verdict("frozen", f"Frozen. It is expected to remove {candidate.expected_gain:.1%} of the divergence.")
    if (recent := swaps_within_hour(swaps, at)) >= limits.max_swaps_per_hour:
        return Verdict("swap_cap", f"{recent} changes in the last hour, {limits.max_swaps_per_hour} are allowed.")
    if transient_bytes > limits.memory_bytes:
        return Verdict(
            "no_memory",
            f"While it is compared, weights would take {transient_bytes:,} bytes, {limits.memory_bytes:,} are allowed.",
        )
    return None


def after_shadowing(shadowed: Shadowed, limits: Limits, *, is_frozen: bool) -> Verdict:
    """Whether a measured candidate goes live."""
    now, new, difference = shadowed.now.value, shadowed.candidate.value, shadowed.difference
    if not (math.isfinite(now) and math.isfinite(new) and math.isfinite(difference.value)):
        return Verdict("not_finite", f"A divergence is not finite: {now} now, {new} then.")
    figures = f"KL {new:.5f} where the plan in force has {now:.5f}"
    if difference.low is None or difference.high is None:
        return Verdict("few_requests", f"{figures}, on too few requests for confidence ({shadowed.num_requests}).")
    figures += f" ({difference.value:+.1%}, 95%: {difference.low:+.1%} to {difference.high:+.1%})"
    if not difference.is_below_zero or difference.value > -limits.min_gain:
        return Verdict("not_better", f"{figures}: not {limits.min_gain:.1%} better with confidence.")
    if is_frozen:
        return Verdict("frozen", f"Frozen meanwhile. {figures}.")
    return Verdict("committed", f"{figures}.")


def swaps_within_hour(swaps: Sequence[float], at: float) -> int:
    return sum(at - HOUR < swap <= at for swap in swaps)


def explain(proposer: Proposer, use: Use, choice: Sequence[int], layer: int, expert: int) -> list[dict[str, Any]]:
    """Why an expert's projections have their precision: use, sensitivity, and what the next steps would do.

    Returns:
        Of each projection: where it is and what that is expected to add to the divergence, its rank among all weights
        by what a step up would gain for its bytes, and every option with bytes and loss, the narrowest first.
    """
    found = proposer.losses(use)
    gains = np.full(len(choice), -np.inf)
    for row, index in enumerate(choice):
        options = proposer.problem.items[row].options
        if index + 1 < len(options):
            extra = options[index + 1].memory_bytes - options[index].memory_bytes
            gains[row] = (found[row, index] - found[row, index + 1]) / max(1, extra)
    order = np.argsort(-gains, kind="stable").tolist()
    place = {row: rank for rank, row in enumerate(order, 1)}
    projections = []
    for row, item in enumerate(proposer.problem.items):
        if (item.layer, item.expert) != (layer, expert):
            continue
        index = choice[row]
        steps: dict[str, Any] = {}
        for name, other in (("down", index - 1), ("up", index + 1)):
            steps[name] = None
            if 0 <= other < len(item.options):
                steps[name] = {
                    "source": item.options[other].source,
                    "bytes": item.options[other].memory_bytes - item.options[index].memory_bytes,
                    "divergence": float(found[row, other] - found[row, index]),
                }
        projections.append(
            {
                "name": item.name,
                "part": item.part,
                "source": item.options[index].source,
                "divergence": float(found[row, index]),
                "step_down": steps["down"],
                "step_up": steps["up"],
                "rank_for_more": place[row] if np.isfinite(gains[row]) else None,
                "num_ranked": int(np.isfinite(gains).sum()),
                "options": [
                    {
                        "source": option.source,
                        "format": option.format,
                        "bytes": option.memory_bytes,
                        "divergence": float(found[row, column]),
                    }
                    for column, option in enumerate(item.options)
                ],
            }
        )
    return projections
