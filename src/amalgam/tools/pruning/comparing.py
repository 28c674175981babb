"""Models that were cut, beside plans of the whole model that take the same bytes.

In: candidates, an opened planner. Out: a `Point` for each candidate and size, with its verdict. Must never know: how a
candidate was chosen, terminals.

At each size both may spend what they have on precision: the whole model in the plan for that size, and the cut one in
the best choice for what remains of it, by the same sensitivities. Both are measured against the whole wide model on
texts that nothing was chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from amalgam.composition.planned import PlannedWeight
from amalgam.composition.progress import Progress
from amalgam.config.placement import BASE_SOURCE
from amalgam.errors import PlanError
from amalgam.evaluation.confidence import Bootstrap, Interval
from amalgam.evaluation.quality import Figures
from amalgam.evaluation.running import Contestant
from amalgam.formats.registry import writable_format
from amalgam.planning.knapsack import solve
from amalgam.planning.losses import Floats, costs
from amalgam.planning.planner import Planner
from amalgam.pruning.trial import on_trial
from amalgam.pruning.writing import SparseMaker
from amalgam.tools.plan import Studio
from amalgam.tools.pruning.choosing import Candidate
from amalgam.tools.pruning.copies import rounded

ALL = "all"
CUT, PLAN, NEITHER = "cut", "plan", "neither"


@dataclass(frozen=True)
class Point:
    """One candidate at one size, and the plan of that size.

    Attributes:
        target: bits of a weight that were asked for; None: the cut model as it is, wide.
        nbytes, plan_bytes: of all weights, as stored.
        plan_bits: of a weight that has a choice.
        divergence, plan_divergence: domain, or `all` → from the whole wide model, nats a token.
        difference: domain → the cut model's divergence to the plan's, less 1; infinite where the plan changes nothing.
    """

    candidate: str
    target: float | None
    nbytes: int
    plan_bytes: int
    plan_bits: float
    divergence: Mapping[str, Interval]
    plan_divergence: Mapping[str, Interval]
    difference: Mapping[str, Interval]

    @property
    def winners(self) -> dict[str, str]:
        """Domain → which has less divergence, with confidence."""
        return {domain: _winner(each) for domain, each in self.difference.items()}

    @property
    def is_worth_it(self) -> bool:
        """Whether the cut model is better than the plan of its size: in all with confidence, and in every domain."""
        return self.winners[ALL] == CUT and all(each.value < 0 for each in self.difference.values())


def _difference(cut: Figures, whole: Figures) -> Interval:
    """Of means, as a share of the plan's; infinite beside a plan that is the whole wide model."""
    if not whole.divergence.any() and cut.divergence.any():
        return Interval(math.inf, math.inf, math.inf)
    return Bootstrap(cut.units).ratio_of_means(cut.divergence, whole.divergence)


def _winner(difference: Interval) -> str:
    if difference.is_below_zero:
        return CUT
    return PLAN if difference.low is not None and difference.low > 0 else NEITHER


class Comparison:
    """Measures candidates beside plans of the whole model.

    Raises:
        AmalgamError: see `Studio.planner`.
    """

    def __init__(self, studio: Studio, candidates: Sequence[Candidate], progress: Progress | None = None) -> None:
        self._base = studio.base()
        self._planner: Planner = studio.planner(self._base)
        self._problem = studio.problem
        self._progress = progress
        self._candidates = candidates
        sample = self._planner.held_out.reference.sample
        self._domains = {name: index for index, name in enumerate(sample.domains)} if len(sample.domains) > 1 else {}

    @property
    def num_tokens(self) -> int:
        return self._planner.held_out.reference.sample.num_tokens

    def points(self, bits: Sequence[float]) -> list[Point]:
        """
        Args:
            bits: sizes, beside that of each cut model as it is: mean bits of a weight of the whole model.
        """
        found: list[Point] = []
        sizes = [None, *sorted(bits, reverse=True)]
        total = len(self._candidates) * len(sizes)
        for number, candidate in enumerate(self._candidates):
            trial = _Trial(self._base, self._planner, candidate)
            for place, target in enumerate(sizes):
                if self._progress is not None:
                    self._progress("Comparing, point", number * len(sizes) + place, total)
                point = self._point(trial, target)
                if point is not None:
                    found.append(point)
        return found

    def _point(self, trial: _Trial, target: float | None) -> Point | None:
        """None where the cut model or the whole one cannot be so small, or the cut one not so large."""
        problem, wide_bytes = self._problem, trial.bytes_of(trial.wide)
        budget = wide_bytes
        if target is not None:
            budget = problem.fixed_stored + math.floor(target * problem.num_weights / 8)
            if budget >= wide_bytes:
                return None
        try:
            choice = trial.wide if target is None else trial.choice(budget)
            plan = solve(self._planner.losses, costs(problem, "stored"), budget - problem.fixed_stored)
        except PlanError:
            return None
        planned = [int(index) for index in plan.choice]
        cut = self._figures(trial.contestant(choice))
        whole = self._planner.held_out.figures("plan", planned)
        return Point(
            trial.candidate.name,
            target,
            trial.bytes_of(choice),
            problem.fixed_stored + problem.stored_bytes(planned),
            problem.bits_per_weight(planned),
            self._means(cut),
            self._means(whole),
            self._differences(cut, whole),
        )

    def _figures(self, contestant: Contestant) -> Figures:
        return self._planner.held_out.reference.figures(contestant)

    def _parts(self, figures: Figures) -> dict[str, Figures]:
        """All, and each domain."""
        parts = {name: figures.only(figures.domains == index) for name, index in self._domains.items()}
        return {ALL: figures, **parts}

    def _means(self, figures: Figures) -> dict[str, Interval]:
        return {name: Bootstrap(part.units).mean(part.divergence) for name, part in self._parts(figures).items()}

    def _differences(self, cut: Figures, whole: Figures) -> dict[str, Interval]:
        others = self._parts(whole)
        return {name: _difference(part, others[name]) for name, part in self._parts(cut).items()}


class _Trial:
    """One candidate, in any precision."""

    def __init__(self, base: Contestant, planner: Planner, candidate: Candidate) -> None:
        self.candidate = candidate
        self._base = base
        self._problem = planner.problem
        pruned = candidate.pruned
        left = {origin: math.prod(slot.shape) for origin, slot in pruned.successors.items()}
        self._share = {slot.name: left.get(slot.name, 0) / math.prod(slot.shape) for slot in pruned.whole.slots}
        shares = np.array([self._share[item.slot] for item in self._problem.items])
        self._rows = np.flatnonzero(shares)  # of the weights that remain
        self._costs = costs(self._problem, "stored")[self._rows] * shares[self._rows][:, None] + self._more_scales()
        self._losses = planner.losses[self._rows]
        self._fixed = self._fixed_bytes()

    def _more_scales(self) -> Floats:
        """Bytes by which weights are larger than their share: fewer inputs may divide into smaller groups only."""
        result = np.zeros((len(self._rows), max(len(item.options) for item in self._problem.items)))
        whole = {slot.name: slot.shape for slot in self.candidate.pruned.whole.slots}
        for row, place in enumerate(self._rows.tolist()):
            item = self._problem.items[place]
            left, share = self.candidate.pruned.successors[item.slot].shape, self._share[item.slot]
            if left == whole[item.slot]:
                continue
            for column, option in enumerate(item.options):
                if option.source != BASE_SOURCE:
                    copy = writable_format(option.source)
                    result[row, column] = copy.nbytes(left) - share * copy.nbytes(whole[item.slot])
        return result

    def _fixed_bytes(self) -> int:
        """Of the weights that have no choice."""
        chosen = {item.slot for item in self._problem.items}
        planned = [weight for weight in self._base.loader.plan(()) if weight.slot.name not in chosen]
        return round(sum(weight.stored.nbytes * self._share[weight.slot.name] for weight in planned))

    @cached_property
    def wide(self) -> list[int]:
        """Every weight from base."""
        found = [item.index_of(BASE_SOURCE) for item in self._problem.items]
        return [index for index in found if index is not None]

    def choice(self, budget: int) -> list[int]:
        """An option for each weight that remains, and base for the others.

        Raises:
            PlanError: not even the narrowest choice is within the budget.
        """
        result = list(self.wide)
        found = solve(self._losses, self._costs, budget - self._fixed)
        for row, option in zip(self._rows.tolist(), found.choice.tolist(), strict=True):
            result[row] = option
        return result

    def bytes_of(self, choice: Sequence[int]) -> int:
        places = np.array(choice)[self._rows]
        return self._fixed + round(float(self._costs[np.arange(len(self._rows)), places].sum()))

    def contestant(self, choice: Sequence[int]) -> Contestant:
        mapping, loader = self._problem.mapping(choice), self._base.loader
        planned: list[PlannedWeight] = []
        for weight in loader.plan(()):
            source = mapping.get(weight.choice.name)
            found = weight if source is None else loader.candidate(weight.choice.name, source)
            assert found is not None
            planned.append(found)
        name, pruned = self.candidate.name, self.candidate.pruned
        return on_trial(name, self._base, planned, pruned, self._load, rounded, self._zeros)

    def _load(self, slot: str) -> Tensor:
        return self.candidate.maker.model.load(slot).dense

    @cached_property
    def _zeros(self) -> Mapping[str, Tensor] | None:
        maker = self.candidate.maker
        return maker.all_sparse() if isinstance(maker, SparseMaker) else None
