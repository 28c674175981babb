"""From texts and a budget to a plan: sensitivities, use, choice, proof.

In: a loader, samples of calibration and held-out text, a budget. Out: a `Plan`. Must never know: files, terminals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from amalgam.base.counting import counted
from amalgam.composition.progress import Progress
from amalgam.errors import PlanError
from amalgam.evaluation.confidence import Interval
from amalgam.planning.budget import Budget
from amalgam.planning.corrections import Check, corrected
from amalgam.planning.devices import Devices
from amalgam.planning.knapsack import Solution, solve
from amalgam.planning.losses import Floats, costs, losses
from amalgam.planning.placement import Placement, can_hold, place, place_chosen
from amalgam.planning.problem import Problem
from amalgam.planning.proof import DECIDING, HAND, UNIFORM, Scale, Verdict, judge
from amalgam.planning.recipes import hand_recipes, random_plan, uniforms, usage_only
from amalgam.planning.sensitivity import Sensitivities
from amalgam.planning.speed import SpeedModel
from amalgam.planning.use import Use

USAGE, SENSITIVITY, RANDOM = "usage only", "sensitivity only", "random"
PLAN = "plan"
_HANDS_MEASURED = 2


@dataclass(frozen=True)
class Costs:
    """What options cost in the unit of a budget, and how much of the budget is left for them."""

    values: Floats
    budget: float


def costs_within(budget: Budget, problem: Problem, other_bytes: int = 0, speed: SpeedModel | None = None) -> Costs:
    """
    Args:
        other_bytes: of KV cache and workspace.
        speed: for budgets of speed.

    Raises:
        PlanError: the smallest plan is above the budget.
    """
    cost = _costs(budget, problem, other_bytes, speed)
    least = float(cost.values.min(axis=1).sum())
    if least <= cost.budget:
        return cost
    spent = least if budget.kind == "speed" else least + budget.value - cost.budget
    says = {
        "bits": f"The smallest plan has {8 * least / problem.num_weights:.3f} bits a weight",
        "bytes": f"The smallest plan takes {spent / 1e6:,.1f} MB, with KV cache and workspace",
        "speed": f"The fastest plan makes {1 / (spent + (speed.rest if speed else 0)):.1f} tok/s here",
    }
    raise PlanError(
        f"{says[budget.kind]}, and the budget is {budget.text}.",
        remedy="Change the budget, or declare a source in a narrower precision.",
    )


def _costs(budget: Budget, problem: Problem, other_bytes: int, speed: SpeedModel | None) -> Costs:
    if budget.kind == "bits":
        return Costs(costs(problem, "stored"), budget.value * problem.num_weights / 8)
    if budget.kind == "speed":
        assert speed is not None, "speed is measured first"
        left = 1.0 / budget.value - speed.rest
        if left <= 0:
            raise PlanError(
                f"{budget.text} leaves no time for weights: the rest of a step takes {speed.rest * 1e3:.2f} "
                "ms on this machine.",
                remedy=f"At most {1 / speed.rest:.1f} tok/s could be reached.",
            )
        return Costs(speed.seconds, left)
    fixed = problem.fixed_memory + other_bytes
    if fixed > budget.value:
        raise PlanError(
            f"{budget.text} is less than what no choice changes: {problem.fixed_memory:,} bytes of weights "
            f"that have none, and {other_bytes:,} of KV cache and workspace.",
            remedy="Raise the budget, or lower --context or --sequences.",
        )
    return Costs(costs(problem, "memory"), budget.value - fixed)


@dataclass(frozen=True)
class Plan:
    """A choice for a budget, and how it came about.

    Attributes:
        solution: the planner's own; its certificate is about expected losses.
        verdict: which choice is returned, by measurement.
        checks: of sensitivities, by group.
        placement: where the weights of the choice that is returned lie; None: there is one device.
    """

    budget: Budget
    solution: Solution
    verdict: Verdict
    checks: Sequence[Check] = ()
    remarks: Sequence[str] = ()
    placement: Placement | None = None


@dataclass
class Planner:
    """Plans for one model, one set of sensitivities and one use; for any budget.

    Attributes:
        calibration: measures choices on the texts that sensitivities were measured on; None: they are not checked.
        held_out: measures choices on others.
        speed: for budgets of speed.
        other_bytes: of KV cache and workspace.
        devices: for budgets of several devices.
        slack: see `place`.
    """

    problem: Problem
    sensitivities: Sensitivities
    use: Use
    held_out: Scale
    calibration: Scale | None = None
    speed: SpeedModel | None = None
    other_bytes: int = 0
    rounds: int = 1
    progress: Progress | None = None
    devices: Devices | None = None
    slack: float = 0.01
    _losses: Floats | None = field(default=None, repr=False)

    @property
    def losses(self) -> Floats:
        """Expected, before any check."""
        if self._losses is None:
            self._losses = losses(self.problem, self.sensitivities, self.use)
        return self._losses

    def costs(self, budget: Budget) -> Costs:
        """
        Raises:
            PlanError: the smallest plan is above the budget.
        """
        if budget.devices:
            assert self.devices is not None, "devices are looked at first"
            return Costs(self.devices.least_memory, sum(each.limit for each in self.devices.places()))
        return costs_within(budget, self.problem, self.other_bytes, self.speed)

    def plan(self, budget: Budget) -> Plan:
        """
        Raises:
            PlanError: the smallest plan is above the budget.
        """
        cost, found = self.costs(budget), self.losses
        solution, placement = self._solved(found, cost, budget)
        checks: list[Check] = []
        for _ in range(self.rounds if self.calibration is not None else 0):
            assert self.calibration is not None
            background = [int(index) for index in solution.choice]
            found, checks = corrected(self.problem, self.losses, self.calibration, background, progress=self.progress)
            solution, placement = self._solved(found, cost, budget)
        choice = [int(index) for index in solution.choice]
        verdict = judge(self.held_out, choice, self._fitting(self.rivals(cost, found), budget))
        if self.devices is not None and placement is not None and list(verdict.choice) != choice:
            placement = place_chosen(verdict.choice, self.devices.places(), self.devices.groups)
        return Plan(budget, solution, verdict, checks, self._remarks(verdict), placement)

    def _solved(self, found: Floats, cost: Costs, budget: Budget) -> tuple[Solution, Placement | None]:
        if not budget.devices:
            return solve(found, cost.values, cost.budget), None
        assert self.devices is not None
        placement = place(found, self.devices.places(), self.devices.groups, slack=self.slack)
        return placement.as_solution(cost.values), placement

    @property
    def _has_choice(self) -> bool:
        return any(len(item.options) > 1 for item in self.problem.items)

    def _fitting(
        self, rivals: Mapping[str, Mapping[str, list[int]]], budget: Budget
    ) -> Mapping[str, Mapping[str, list[int]]]:
        """Those that the devices can hold; none where no weight has a choice of sources."""
        if not self._has_choice:
            return {}
        if not budget.devices:
            return rivals
        assert self.devices is not None
        places, groups = self.devices.places(), self.devices.groups
        return {
            kind: {name: choice for name, choice in named.items() if can_hold(choice, places, groups)}
            for kind, named in rivals.items()
        }

    def rivals(self, cost: Costs, found: Floats, seed: int = 0) -> dict[str, dict[str, list[int]]]:
        """Kind → name → choice."""
        problem, values, budget = self.problem, cost.values, cost.budget
        hands = list(hand_recipes(problem, values, budget))
        rows = np.arange(len(found))
        # By our own expectation, which who writes recipes does not have, and by size.
        hands.sort(key=lambda entry: float(found[rows, np.asarray(entry[1])].sum()))
        even = losses(problem, self.sensitivities, None)
        return {
            UNIFORM: uniforms(problem, values, budget),
            HAND: dict(hands[:_HANDS_MEASURED]),
            USAGE: {USAGE: usage_only(problem, values, budget, self.use)},
            SENSITIVITY: {SENSITIVITY: [int(index) for index in solve(even, values, budget).choice]},
            RANDOM: {RANDOM: random_plan(problem, values, budget, seed)},
        }

    def _remarks(self, verdict: Verdict) -> list[str]:
        found = [self.use.remark()]
        kinds = {rival.kind for rival in verdict.rivals}
        if self._has_choice:
            missing = [called for kind, called in DECIDING.items() if kind not in kinds]
            found += [f"No {called} of these sources is within the budget." for called in missing]
        else:
            found.append("No weight has a choice of sources: there is no other plan to compare with.")
        unreached = [
            item.name
            for item in self.problem.items
            if item.name in self.sensitivities.weights and not self.sensitivities.weights[item.name].num_tokens
        ]
        if unreached:
            found.append(
                f"No token of the texts reached the experts of {counted(len(unreached), 'weight')}, for instance "
                f"{unreached[0]}: what rounding does there is taken from the layer's mean."
            )
        for source, reason in self.problem.left_out.items():
            found.append(f"Source {source} was left out: {reason}")
        return found

    def frontier(self, budgets: Sequence[Budget]) -> list[Point]:
        """What each way of planning reaches at each budget, measured on the held-out texts."""
        points: list[Point] = []
        for number, budget in enumerate(budgets):
            if self.progress is not None:
                self.progress("Drawing the frontier", number, len(budgets))
            cost = self.costs(budget)
            choice = [int(index) for index in solve(self.losses, cost.values, cost.budget).choice]
            choices: dict[str, Mapping[str, Sequence[int]]] = {PLAN: {PLAN: choice}, **self.rivals(cost, self.losses)}
            for kind, named in choices.items():
                measured = [(self.held_out.divergence(name, each), name, each) for name, each in named.items()]
                if not measured:
                    continue
                divergence, name, each = min(measured, key=lambda entry: entry[0].value)
                points.append(
                    Point(
                        kind,
                        name,
                        budget.text,
                        self.problem.bits_per_weight(each),
                        self.problem.fixed_memory + self.problem.memory_bytes(each),
                        divergence,
                    )
                )
        return points

    def range_of(self, kind: str) -> tuple[float, float]:
        """Costs of the smallest plan and the largest."""
        cost = costs(self.problem, kind)
        finite = np.where(np.isfinite(cost), cost, -np.inf)
        return float(cost.min(axis=1).sum()), float(finite.max(axis=1).sum())


@dataclass(frozen=True)
class Point:
    """One way of planning at one budget."""

    kind: str
    name: str
    budget: str
    bits_per_weight: float
    nbytes: int
    divergence: Interval
