"""The knapsack problem with several capacities, and items that go together: least value within all of them.

In: values and costs of every option on every place. Out: a choice and a lower bound that no choice can beat. Must never
know: what the items, places and capacities are.

Each item takes one option on one place. Items of a group are on the same place.

1. The Lagrangian dual by cutting planes (Kelley 1960): with a price for each capacity every group chooses for itself,
   which gives a bound and a plane above the dual; the best point below all planes is asked next.
2. The options that lose least at these prices go to HiGHS (Huangfu & Hall 2018); all others are settled. An option that
   was left out costs at least its loss more than the dual's bound, so that HiGHS' bound holds for the whole problem as
   far as that (Nauss 1978).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

from amalgam.errors import PlanError
from amalgam.planning.knapsack import Allowance, silent_solver

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
_PLANES = 200
_PLANE_GAP = 1e-7  # where cutting planes stop, as a share of what the dual spans
_TOLERANCE = 1e-9  # of HiGHS, as a share of the largest cost: less than a byte
_CORES = (3_000, 20_000)  # options of groups that HiGHS is given, one after the other


@dataclass(frozen=True)
class Capacity:
    """What options cost of something that there is so much of.

    Attributes:
        cost: `[items, places, options]`.
    """

    cost: Floats
    limit: float


@dataclass(frozen=True)
class Problem:
    """Attributes:
    value: `[items, places, options]`, to be made small; infinite: no such option.
    groups: int64 `[items]`, 0, 1, …: items of one number are on the same place.
    """

    value: Floats
    capacities: Sequence[Capacity]
    groups: Integers

    @property
    def num_groups(self) -> int:
        return int(self.groups.max()) + 1


@dataclass(frozen=True)
class Choice:
    """Attributes:
    places, options: int64 `[items]`.
    bound: no choice within the capacities has less value.
    num_open: items that HiGHS has chosen for.
    """

    places: Integers
    options: Integers
    value: float
    bound: float
    num_open: int
    seconds: float

    @property
    def gap(self) -> float:
        """How much larger than the least value this may be, as a share."""
        return max(0.0, self.value - self.bound) / abs(self.value) if self.value else 0.0


def taken(values: Floats, places: Integers, options: Integers) -> float:
    """Sum over all items of what they have chosen, of `[items, places, options]`."""
    return float(values[np.arange(len(values)), places, options].sum())


def minimise(
    problem: Problem,
    known: tuple[Integers, Integers] | None = None,
    *,
    gap: float = 1e-4,
    allowance: Allowance | None = None,
) -> Choice:
    """
    Args:
        known: places and options of a choice within the capacities, which the result is not worse than.
        gap: HiGHS stops where it is sure to be so near to the best, as a share.
        allowance: most time for HiGHS; None: 20 seconds.

    Raises:
        PlanError: nothing within the capacities was found.
    """
    started = time.monotonic()
    allowance = allowance or Allowance(20.0)
    dual = _Dual(problem)
    prices, of_prices = dual.maximise()
    penalty = dual.penalties(prices)
    best, bound = known, of_prices
    num_open = 0
    for size in _CORES:
        core = _Core(problem, penalty, size)
        found, core_bound = core.solve(best, gap, allowance)
        num_open = core.num_open
        if found is not None:
            best = found
        bound = max(bound, min(core_bound, of_prices + core.least_left_out))
        if core.is_whole or allowance.left <= 0:
            break
        if best is not None:
            value = taken(problem.value, *best)
            if value - bound <= gap * abs(value):
                break
    if best is None:
        raise PlanError(
            "No choice was found that keeps all budgets.",
            remedy="Raise a budget, or declare a source in a narrower precision.",
        )
    value = taken(problem.value, *best)
    return Choice(best[0], best[1], value, min(bound, value), num_open, time.monotonic() - started)


class _Dual:
    """The largest bound that prices give."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._value = problem.value
        self._exists = np.isfinite(problem.value)
        self._costs = [np.where(self._exists, capacity.cost, 0.0) for capacity in problem.capacities]
        self._limits = np.array([capacity.limit for capacity in problem.capacities])
        # Prices are asked for in units in which limits are 1.
        self._units = np.maximum(np.abs(self._limits), 1e-300)

    def _priced(self, prices: Floats) -> Floats:
        total = self._value.copy()
        for price, cost in zip(prices, self._costs, strict=True):
            if price:
                total += price * cost
        return total

    def _by_group(self, least: Floats) -> Floats:
        """`[items, places]` → sums over groups."""
        groups, count = self._problem.groups, self._problem.num_groups
        columns = [np.bincount(groups, column, count) for column in least.T]
        return np.stack(columns, axis=1)

    def choose(self, prices: Floats) -> tuple[Integers, Integers, float]:
        """What everyone takes at these prices, and the bound that follows."""
        total = self._priced(prices)
        sums = self._by_group(total.min(axis=2))
        places = sums.argmin(axis=1)[self._problem.groups]
        options = total[np.arange(len(total)), places].argmin(axis=1)
        return places, options, float(sums.min(axis=1).sum() - prices @ self._limits)

    def penalties(self, prices: Floats) -> Floats:
        """How much worse than the best at these prices a choice is that has an option, `[items, places, options]`."""
        total = self._priced(prices)
        least = total.min(axis=2)
        sums = self._by_group(least)
        with np.errstate(invalid="ignore"):
            of_group = (sums - sums.min(axis=1, keepdims=True))[self._problem.groups]
            found = total - least[:, :, None] + of_group[:, :, None]
        return np.where(self._exists & np.isfinite(found), found, np.inf)

    def maximise(self) -> tuple[Floats, float]:
        """Prices and bound."""
        count = len(self._limits)
        finite = np.where(self._exists, self._value, np.nan)
        span = float((np.nanmax(finite, axis=(1, 2)) - np.nanmin(finite, axis=(1, 2))).sum())
        span = max(span, 1e-300)
        ceiling = 1e3  # of a price, with which a thousandth of the limit costs more than all that options differ in
        solver = silent_solver()
        inf = highspy.kHighsInf
        solver.addVars(count + 1, np.array([*[0.0] * count, -inf]), np.array([*[ceiling] * count, inf]))
        solver.changeObjectiveSense(highspy.ObjSense.kMaximize)
        solver.changeColCost(count, 1.0)
        at = np.zeros(count)
        best, best_bound = at, -np.inf
        columns = np.arange(count + 1, dtype=np.int32)
        for _ in range(_PLANES):
            prices = at * span / self._units
            places, options, bound = self.choose(prices)
            if bound > best_bound:
                best, best_bound = prices, bound
            used = np.array([taken(cost, places, options) for cost in self._costs])
            slopes = (used - self._limits) / self._units
            height = taken(np.where(self._exists, self._value, 0.0), places, options) / span
            solver.addRow(-inf, height, count + 1, columns, np.array([*(-slopes), 1.0]))
            solver.run()
            values = np.asarray(solver.getSolution().col_value)
            at = np.clip(values[:count], 0.0, ceiling)
            if values[count] - best_bound / span <= _PLANE_GAP:
                break
        return best, best_bound


class _Core:
    """The part of a problem that prices leave open, for HiGHS.

    Attributes:
        least_left_out: every choice with an option that is not in here is worse than the dual's bound by so much.
        is_whole: nothing is left out.
    """

    def __init__(self, problem: Problem, penalty: Floats, size: int) -> None:
        self._problem = problem
        exists = np.isfinite(penalty)
        ordered = np.sort(penalty[exists & (penalty > 0)])
        self.is_whole = len(ordered) <= size
        threshold = np.inf if self.is_whole else float(ordered[size])
        is_in = exists if self.is_whole else exists & ((penalty < threshold) | (penalty <= 0))
        self.least_left_out = threshold
        self._settle(is_in, penalty)

    def _settle(self, is_in: npt.NDArray[np.bool_], penalty: Floats) -> None:
        groups, count = self._problem.groups, self._problem.num_groups
        places_in: npt.NDArray[np.bool_] = np.any(is_in, axis=2)
        complete = np.stack(
            [np.bincount(groups, ~places_in[:, place], count) == 0 for place in range(places_in.shape[1])], axis=1
        )
        is_in &= complete[groups][:, :, None]
        self._is_in = is_in
        is_open = is_in.sum(axis=(1, 2)) > 1
        self._several = complete.sum(axis=1) > 1  # of groups: whether places are open
        self._is_open = is_open | self._several[groups]
        masked = np.where(is_in, penalty, np.inf).reshape(len(groups), -1)
        best = masked.argmin(axis=1)
        self._places, self._options = best // is_in.shape[2], best % is_in.shape[2]
        self.num_open = int(self._is_open.sum())

    def solve(
        self, known: tuple[Integers, Integers] | None, gap: float, allowance: Allowance
    ) -> tuple[tuple[Integers, Integers] | None, float]:
        """The best choice that is better than what is known, and a bound of all choices in the core."""
        problem, groups = self._problem, self._problem.groups
        settled = ~self._is_open
        columns = np.argwhere(self._is_in & self._is_open[:, None, None])
        if not len(columns):
            return self._checked(known, self._places, self._options), taken(problem.value, self._places, self._options)
        at = tuple(columns.T)
        open_groups = np.unique(groups[self._is_open & self._several[groups]])
        model, unit = self._model(columns, open_groups, settled)
        fixed = float(problem.value[np.arange(len(groups)), self._places, self._options][settled].sum())
        solver = silent_solver()
        for name, value in (
            ("mip_rel_gap", gap), ("mip_feasibility_tolerance", _TOLERANCE),
            ("primal_feasibility_tolerance", _TOLERANCE),
        ):  # fmt: skip
            solver.setOptionValue(name, value)
        solver.passModel(model)
        if known is not None:
            self._start(solver, columns, open_groups, known)
        allowance.run(solver)
        info = solver.getInfo()
        found = known
        values = np.asarray(solver.getSolution().col_value)
        if info.primal_solution_status == 2 and len(values):
            places, options = self._places.copy(), self._options.copy()
            is_taken = values[: len(columns)] > 0.5
            places[at[0][is_taken]], options[at[0][is_taken]] = at[1][is_taken], at[2][is_taken]
            found = self._checked(known, places, options)
        status = solver.getModelStatus()
        if status == highspy.HighsModelStatus.kInfeasible:
            return found, np.inf
        bound = info.mip_dual_bound * unit + fixed
        return found, bound if np.isfinite(bound) else -np.inf

    def _model(
        self, columns: Integers, open_groups: Integers, settled: npt.NDArray[np.bool_]
    ) -> tuple[highspy.HighsLp, float]:
        """Columns: the options, then each open group's places. Rows: capacities, items, groups."""
        problem, groups = self._problem, self._problem.groups
        items, places, options = columns.T
        num_places, many = problem.value.shape[1], len(columns)
        values = problem.value[items, places, options]
        unit = max(float(np.abs(values).max()), 1e-300)  # HiGHS works with absolute tolerances
        number_of_group = np.full(problem.num_groups, -1)
        number_of_group[open_groups] = np.arange(len(open_groups))
        has_place = np.zeros((len(open_groups), num_places), dtype=bool)
        linked = number_of_group[groups[items]]
        has_place[linked[linked >= 0], places[linked >= 0]] = True
        place_columns = np.argwhere(has_place)
        column_of_place = np.full(has_place.shape, -1)
        column_of_place[has_place] = many + np.arange(len(place_columns))
        # A row of an item for each place where the place is open, else one for the item.
        keys = np.where(linked >= 0, items * (num_places + 1) + places + 1, items * (num_places + 1))
        row_keys, row_of_column = np.unique(keys, return_inverse=True)
        first_row = len(problem.capacities)
        row_count = first_row + len(row_keys) + len(open_groups)
        entries: list[tuple[Integers, Integers, Floats]] = []
        lower, upper = np.zeros(row_count), np.zeros(row_count)
        rest = np.arange(len(groups))[settled]
        for row, capacity in enumerate(problem.capacities):
            cost = capacity.cost[items, places, options]
            scale = max(float(np.abs(cost).max()), 1e-300)
            used = float(capacity.cost[rest, self._places[rest], self._options[rest]].sum())
            lower[row], upper[row] = -highspy.kHighsInf, (capacity.limit - used) / scale
            entries.append((np.full(many, row), np.arange(many), cost / scale))
        entries.append((first_row + row_of_column, np.arange(many), np.ones(many)))
        item_of_row, place_of_row = np.divmod(row_keys, num_places + 1)
        is_linked = place_of_row > 0
        lower[first_row : first_row + len(row_keys)] = upper[first_row : first_row + len(row_keys)] = ~is_linked
        linked_rows = np.flatnonzero(is_linked)
        switches = column_of_place[number_of_group[groups[item_of_row[is_linked]]], place_of_row[is_linked] - 1]
        entries.append((first_row + linked_rows, switches, -np.ones(len(linked_rows))))
        group_rows = first_row + len(row_keys) + place_columns[:, 0]
        entries.append((group_rows, many + np.arange(len(place_columns)), np.ones(len(place_columns))))
        lower[first_row + len(row_keys) :] = upper[first_row + len(row_keys) :] = 1.0
        rows, cols, coefficients = (np.concatenate(parts) for parts in zip(*entries, strict=True))
        order = np.lexsort((rows, cols))
        total = many + len(place_columns)
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = total, row_count
        model.col_cost_ = np.concatenate([values / unit, np.zeros(len(place_columns))])
        model.col_lower_, model.col_upper_ = np.zeros(total), np.ones(total)
        model.row_lower_, model.row_upper_ = lower, upper
        model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        model.a_matrix_.start_ = np.searchsorted(cols[order], np.arange(total + 1))
        model.a_matrix_.index_, model.a_matrix_.value_ = rows[order], coefficients[order]
        model.integrality_ = [highspy.HighsVarType.kInteger] * total
        self._place_columns = place_columns
        return model, unit

    def _start(
        self,
        solver: highspy.Highs,
        columns: Integers,
        open_groups: Integers,
        known: tuple[Integers, Integers],
    ) -> None:
        """Tell HiGHS what is known, where the core has it."""
        items, places, options = columns.T
        values = (known[0][items] == places) & (known[1][items] == options)
        place_of_group = np.zeros(self._problem.num_groups, dtype=np.int64)
        place_of_group[self._problem.groups] = known[0]
        switches = place_of_group[open_groups[self._place_columns[:, 0]]] == self._place_columns[:, 1]
        solution = highspy.HighsSolution()
        solution.col_value = np.concatenate([values, switches]).astype(float).tolist()
        solver.setSolution(solution)

    def _checked(
        self, known: tuple[Integers, Integers] | None, places: Integers, options: Integers
    ) -> tuple[Integers, Integers] | None:
        """A choice if it keeps all capacities and is better than what is known."""
        for capacity in self._problem.capacities:
            most = np.abs(capacity.cost[np.isfinite(capacity.cost)]).max(initial=0.0)
            if taken(capacity.cost, places, options) > capacity.limit + _TOLERANCE * most:
                return known
        value = self._problem.value
        if known is not None and taken(value, places, options) >= taken(value, *known):
            return known
        return places, options
