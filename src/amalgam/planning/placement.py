"""What each weight is stored in and where it lies: quality first, and speed within what that leaves.

In: losses, and for each device how much there is of it, what options take there and how long a step reads them. Out: a
`Placement`. Must never know: what a device is, files.

1. The least loss that all devices together allow. Where a weight lies does not change what it computes, so of two plans
   with the same loss the faster is taken: a step's seconds count as so little loss that no plan costs more than half of
   `slack` for them.
2. The least seconds of a step among all plans, sources and devices, whose loss is within `slack` of the least.

An expert lies on one device whole, so its weights go together. Seconds are a sum: one device after the other. Two that
compute at the same time are faster than that, and the sum still says which expert is worth a place on the faster one.
With equal sources it is the one that is used most, whatever it is stored in: what it saves and what it takes grow with
its bytes alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from amalgam.planning.knapsack import Allowance, Solution, solve
from amalgam.planning.lagrangian import Capacity, Floats, Integers, Problem, minimise, taken

_SECONDS_GAP = 5e-3  # of the fastest placement: less than what bandwidths are certain to
_LEAST_WEIGHT = 1e-6  # of seconds beside losses, so that ties are broken where no slack is given


@dataclass(frozen=True)
class Place:
    """One device, as the weights that have a choice see it.

    Attributes:
        limit: bytes that they may take there.
        memory: `[items, options]`, bytes; infinite: this cannot lie here.
        seconds: `[items, options]`, expected of a step.
    """

    name: str
    limit: float
    memory: Floats
    seconds: Floats


@dataclass(frozen=True)
class Placement:
    """Attributes:
    options: int64 `[items]`.
    places: int64 `[items]`, index of the device.
    loss: expected; `loss_bound`: nothing that fits has less.
    seconds: of a step, expected; `seconds_bound`: nothing that fits and is within the slack takes less.
    num_open: items that HiGHS has chosen for.
    """

    options: Integers
    places: Integers
    loss: float
    loss_bound: float
    seconds: float
    seconds_bound: float
    num_open: int
    solve_seconds: float

    @property
    def seconds_gap(self) -> float:
        """How much slower than the fastest this may be, as a share."""
        return max(0.0, self.seconds - self.seconds_bound) / self.seconds if self.seconds else 0.0

    def as_solution(self, memory: Floats) -> Solution:
        """The choice alone; memory: `[items, options]`, of each where it takes least."""
        cost = float(memory[np.arange(len(self.options)), self.options].sum())
        return Solution(self.options, self.loss, cost, self.loss_bound, self.num_open, self.solve_seconds)


def place(
    losses: Floats,
    places: Sequence[Place],
    groups: Integers,
    *,
    slack: float = 0.01,
    gap: float = 1e-4,
    limit: float = 5.0,
) -> Placement:
    """
    Args:
        losses: `[items, options]`; infinite: no such option.
        groups: int64 `[items]`: items of one number lie on one device.
        slack: how much larger than the least the loss may be, as a share, for a faster step.
        gap: of the loss, where searching ends, as a share.
        limit: most seconds for HiGHS, for each of the two, whatever it is asked on the way.

    Raises:
        PlanError: the weights do not fit.
    """
    table = _Table(losses, places, groups)
    # All devices as one: what they have together, and every weight where it takes least. Nothing can be better.
    started, allowance = time.monotonic(), Allowance(limit)
    together = solve(losses, table.memory.min(axis=1), table.limit, gap=gap, allowance=allowance)
    known, loss_bound = table.nearly(losses, gap, allowance), together.bound
    if known is None or taken(table.value, *known) > (1 + max(slack / 2, gap)) * loss_bound:
        weight = _weight_of(table.value, table.seconds, together.loss, slack)
        problem = Problem(table.value + weight * table.seconds, table.capacities, groups)
        found = minimise(problem, known, gap=max(gap, slack / 4), allowance=allowance)
        known = found.places, found.options
        loss_bound = max(loss_bound, found.bound - weight * _most(table.seconds))
    loss = taken(table.value, *known)
    within = Capacity(table.value, max(loss, (1 + slack) * max(0.0, loss_bound)))
    quickest = Problem(table.seconds, [*table.capacities, within], groups)
    fast = minimise(quickest, known, gap=_SECONDS_GAP, allowance=Allowance(limit))
    return Placement(
        fast.options,
        fast.places,
        taken(table.value, fast.places, fast.options),
        min(loss_bound, loss),
        fast.value,
        fast.bound,
        fast.num_open,
        time.monotonic() - started,
    )


class _Table:
    """What there is to choose from, `[items, places, options]`; infinite where an option cannot be."""

    def __init__(self, losses: Floats, places: Sequence[Place], groups: Integers) -> None:
        memory = np.stack([each.memory for each in places], axis=1)
        exists = np.isfinite(losses)[:, None, :] & np.isfinite(memory)
        self.memory = np.where(exists, memory, np.inf)
        self.seconds = np.where(exists, np.stack([each.seconds for each in places], axis=1), np.inf)
        self.value = np.where(exists, losses[:, None, :], np.inf)
        self.groups = groups
        self.limits = [each.limit for each in places]

    @property
    def limit(self) -> float:
        """Of all together."""
        return sum(self.limits)

    @cached_property
    def capacities(self) -> list[Capacity]:
        """What lies elsewhere takes nothing here."""
        found = []
        for index, limit in enumerate(self.limits):
            cost = np.zeros_like(self.memory)
            cost[:, index] = self.memory[:, index]
            found.append(Capacity(cost, limit))
        return found

    def nearly(self, losses: Floats, gap: float, allowance: Allowance) -> tuple[Integers, Integers] | None:
        """Places and options of about the least loss: sources first, with room for one expert left on each device,
        then devices; None: they do not fit so."""
        for memory in (self.memory.min(axis=1), np.where(np.isfinite(losses), _largest(self.memory), np.inf)):
            widest = np.bincount(self.groups, _largest(memory)).max()
            limit = self.limit - len(self.limits) * widest
            if memory.min(axis=1).sum() > limit:
                continue
            options = solve(losses, memory, limit, gap=gap, allowance=allowance).choice
            places = self.filled(options)
            if places is not None:
                return places, self._refined(losses, options, places, gap, allowance)
        return None

    def _refined(
        self, losses: Floats, options: Integers, places: Integers, gap: float, allowance: Allowance
    ) -> Integers:
        """The least loss of each device by itself, where it is known what lies there: room that was left is used."""
        result = options.copy()
        for place, limit in enumerate(self.limits):
            here = np.flatnonzero(places == place)
            if len(here):
                exists = np.isfinite(self.memory[here, place])
                own = np.where(exists, losses[here], np.inf)
                result[here] = solve(own, self.memory[here, place], limit, gap=gap, allowance=allowance).choice
        return result

    def filled(self, options: Sequence[int] | Integers) -> Integers | None:
        """Where weights of these options lie: on the fastest device those that gain most there for their bytes, as long
        as there is room, and so on.

        Returns:
            int64 `[items]`; None: they do not fit so.
        """
        count = int(self.groups.max()) + 1
        rows = np.arange(len(options))
        memory, seconds = (
            np.stack([np.bincount(self.groups, column, count) for column in values[rows, :, options].T], axis=1)
            for values in (self.memory, self.seconds)
        )
        left = np.array(self.limits, dtype=float)
        result = np.full(count, -1)
        can = np.isfinite(memory)
        forced = can.sum(axis=1) == 1
        result[forced] = can[forced].argmax(axis=1)
        left -= [memory[forced & (result == place), place].sum() for place in range(len(left))]
        speed = np.where(can, seconds, 0.0).sum(axis=0) / np.maximum(can.sum(axis=0), 1)
        for place in np.argsort(speed, kind="stable"):
            open_groups = np.flatnonzero((result < 0) & can[:, place])
            slowest = np.where(can, seconds, -np.inf)[open_groups].max(axis=1)
            gain = (slowest - seconds[open_groups, place]) / np.maximum(memory[open_groups, place], 1)
            for group in open_groups[np.argsort(-gain, kind="stable")]:
                if memory[group, place] <= left[place]:
                    left[place] -= memory[group, place]
                    result[group] = place
        return result[self.groups] if (result >= 0).all() and (left >= 0).all() else None


def _largest(values: Floats) -> Floats:
    """Over the second axis, of those that are finite."""
    return np.asarray(np.where(np.isfinite(values), values, -np.inf).max(axis=1))


def can_hold(options: Sequence[int], places: Sequence[Place], groups: Integers) -> bool:
    """Whether weights whose sources are chosen fit, by filling the devices one after the other."""
    return _Table(np.zeros((len(options), 1)), _only(options, places), groups).filled([0] * len(options)) is not None


def place_chosen(options: Sequence[int], places: Sequence[Place], groups: Integers) -> Placement:
    """Where weights lie whose sources are chosen.

    Raises:
        PlanError: they do not fit.
    """
    found = place(np.zeros((len(options), 1)), _only(options, places), groups)
    return replace(found, options=np.asarray(options, dtype=np.int64))


def _only(options: Sequence[int], places: Sequence[Place]) -> list[Place]:
    """The places, with nothing to choose from but these."""
    rows, chosen = np.arange(len(options)), np.asarray(options, dtype=np.int64)
    return [
        replace(each, memory=each.memory[rows, chosen][:, None], seconds=each.seconds[rows, chosen][:, None])
        for each in places
    ]


def _most(values: Floats) -> float:
    return float(np.where(np.isfinite(values), values, -np.inf).max(axis=(1, 2)).sum())


def _weight_of(value: Floats, seconds: Floats, loss: float, slack: float) -> float:
    """Loss that a second counts as."""
    spread = _most(seconds) - float(seconds.min(axis=(1, 2)).sum())
    if spread <= 0:
        return 0.0
    scale = max(loss, 1e-9 * _most(value), 1e-12)
    return max(slack / 2, _LEAST_WEIGHT) * scale / spread
