"""The multiple-choice knapsack problem (Sinha & Zoltners 1979): one option for each item, least loss within a budget.

In: losses and costs of every option. Out: a choice and a lower bound that no choice can beat, so that the gap between
the two certifies it. Must never know: what the items are.

1. The Lagrangian dual, by bisection over the price of a unit of cost: a bound, and a choice within the budget.
2. Options that the bound excludes from every choice better than the one at hand are dropped (Nauss 1978; the gap is a
   fraction of one item, so that of hundreds of thousands of options some hundreds remain).
3. What remains goes to HiGHS (Huangfu & Hall 2018), whose own bound holds for the whole problem.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from dataclasses import dataclass

import highspy
import numpy as np
import numpy.typing as npt

from amalgam.errors import PlanError

Floats = npt.NDArray[np.float64]
_BISECTIONS = 100
_EXACT_OPTIONS = 20_000  # of a core that HiGHS is given
_LEAST_SECONDS = 0.2  # for one problem, in which HiGHS takes up what is known already


@dataclass(frozen=True)
class Solution:
    """A choice and its certificate.

    Attributes:
        choice: int64 `[items]`, an option of each.
        loss, cost: of the choice.
        bound: no choice within the budget has less loss.
        num_open: items whose option the dual bound left open; HiGHS has chosen those.
    """

    choice: npt.NDArray[np.int64]
    loss: float
    cost: float
    bound: float
    num_open: int
    seconds: float

    @property
    def gap(self) -> float:
        """How much larger than the least loss this may be, as a share."""
        return max(0.0, self.loss - self.bound) / abs(self.loss) if self.loss else 0.0


class Allowance:
    """Seconds that HiGHS may take for several problems together.

    Attributes:
        left: what is left of them; below 0 where HiGHS has taken longer than it might.
    """

    def __init__(self, seconds: float) -> None:
        self.left = seconds

    def run(self, solver: highspy.Highs) -> None:
        """Let it solve within what is left."""
        solver.setOptionValue("time_limit", max(_LEAST_SECONDS, self.left))
        started = time.monotonic()
        solver.run()
        self.left -= time.monotonic() - started


def solve(
    loss: Floats, cost: Floats, budget: float, *, gap: float = 1e-4, allowance: Allowance | None = None
) -> Solution:
    """
    Args:
        loss, cost: `[items, options]`; infinite loss: no such option.
        gap: HiGHS stops where it is sure to be so near to the best, as a share.
        allowance: most time for HiGHS; the certificate then says how far it came. None: 20 seconds.

    Raises:
        PlanError: the cheapest choice costs more than the budget.
    """
    started = time.monotonic()
    exists = np.isfinite(loss)
    cost = np.where(exists, cost, np.inf)
    rows = np.arange(len(loss))
    cheapest = cost.argmin(axis=1)
    least = float(cost[rows, cheapest].sum())
    if least > budget:
        raise PlanError(
            f"The smallest plan takes {least:,.0f}, and the budget leaves {budget:,.0f} for the weights that have a "
            "choice.",
            remedy="Raise the budget, or declare a source in a narrower precision.",
        )
    choice, price = _dual(loss, cost, budget)
    choice = _filled(choice, loss, cost, budget)
    bound = _bound(loss, cost, budget, price)
    best = float(loss[rows, choice].sum())
    num_open = 0
    if best - bound > gap * abs(best):
        core = _core(loss, cost, price, best, bound)
        num_open = int((core.sum(axis=1) > 1).sum())
        if core.sum() - len(loss) <= _EXACT_OPTIONS:
            choice, bound = _exact(loss, cost, budget, core, choice, bound, gap, allowance or Allowance(20.0))
    return Solution(
        choice.astype(np.int64),
        float(loss[rows, choice].sum()),
        float(cost[rows, choice].sum()),
        min(bound, float(loss[rows, choice].sum())),
        num_open,
        time.monotonic() - started,
    )


def _at(loss: Floats, cost: Floats, price: float) -> npt.NDArray[np.int64]:
    """Each item's best option where a unit of cost has this price; of equals the cheapest."""
    total = loss + price * np.where(np.isfinite(cost), cost, 0.0)
    least = total.min(axis=1, keepdims=True)
    is_best = total <= least + 1e-15 * np.abs(least)
    return np.asarray(np.where(is_best, cost, np.inf).argmin(axis=1))


def _dual(loss: Floats, cost: Floats, budget: float) -> tuple[npt.NDArray[np.int64], float]:
    """The least price at which what everyone would choose is within the budget."""
    rows = np.arange(len(loss))
    choice = _at(loss, cost, 0.0)
    if cost[rows, choice].sum() <= budget:
        return choice, 0.0
    low, high = 0.0, 1.0
    finite = np.where(np.isfinite(loss), loss, 0.0)
    scale = max(float(finite.max() - finite.min()), 1e-30)
    spread = np.where(np.isfinite(cost), cost, np.nan)
    high = scale / max(float(np.nanmin(np.where(spread > 0, spread, np.nan))), 1e-30) + 1e-30
    while cost[rows, _at(loss, cost, high)].sum() > budget:
        high *= 4
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if cost[rows, _at(loss, cost, middle)].sum() > budget:
            low = middle
        else:
            high = middle
        if high - low <= 1e-12 * high:
            break
    return _at(loss, cost, high), high


def _bound(loss: Floats, cost: Floats, budget: float, price: float) -> float:
    total = loss + price * np.where(np.isfinite(cost), cost, 0.0)
    return float(total.min(axis=1).sum() - price * budget)


def _filled(choice: npt.NDArray[np.int64], loss: Floats, cost: Floats, budget: float) -> npt.NDArray[np.int64]:
    """Spend what is left, on what gains most for it."""
    choice = choice.copy()
    rows = np.arange(len(loss))
    left = budget - float(cost[rows, choice].sum())
    gain = loss[rows, choice][:, None] - loss
    extra = np.where(np.isfinite(cost), cost, np.inf) - cost[rows, choice][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where((gain > 0) & (extra <= left), gain / np.maximum(extra, 1e-12), -np.inf)
    for flat in np.argsort(-rate, axis=None)[: 4 * len(loss)]:
        item, option = divmod(int(flat), loss.shape[1])
        if not np.isfinite(rate[item, option]):
            break
        now = loss[item, choice[item]] - loss[item, option]
        more = cost[item, option] - cost[item, choice[item]]
        if now > 0 and more <= left:
            left -= more
            choice[item] = option
    return choice


def _core(loss: Floats, cost: Floats, price: float, best: float, bound: float) -> npt.NDArray[np.bool_]:
    """Which options a better choice than the one at hand may hold: `[items, options]`."""
    total = loss + price * np.where(np.isfinite(cost), cost, 0.0)
    penalty = total - total.min(axis=1, keepdims=True)
    slack = best - bound
    return np.asarray(np.isfinite(loss) & (penalty <= slack * (1 + 1e-9) + 1e-300))


def _exact(
    loss: Floats,
    cost: Floats,
    budget: float,
    core: npt.NDArray[np.bool_],
    choice: npt.NDArray[np.int64],
    bound: float,
    gap: float,
    allowance: Allowance,
) -> tuple[npt.NDArray[np.int64], float]:
    """HiGHS on the core: its choice if that is better, and the better bound."""
    is_open = core.sum(axis=1) > 1
    rows = np.arange(len(loss))
    settled = np.where(core.any(axis=1), core.argmax(axis=1), choice)
    fixed_loss = float(loss[rows, settled][~is_open].sum())
    fixed_cost = float(cost[rows, settled][~is_open].sum())
    places = np.argwhere(core & is_open[:, None])
    losses = loss[places[:, 0], places[:, 1]]
    costs = cost[places[:, 0], places[:, 1]]
    scale = max(float(losses.max()), 1e-300)  # HiGHS works with absolute tolerances
    unit = max(float(costs.max()), 1.0)
    model = highspy.HighsLp()
    model.num_col_, numbers = len(places), np.unique(places[:, 0], return_inverse=True)[1]
    num_items = int(numbers.max()) + 1
    model.num_row_ = num_items + 1
    model.col_cost_ = losses / scale
    model.col_lower_, model.col_upper_ = np.zeros(len(places)), np.ones(len(places))
    model.row_lower_ = np.concatenate([np.ones(num_items), [-highspy.kHighsInf]])
    model.row_upper_ = np.concatenate([np.ones(num_items), [(budget - fixed_cost) / unit]])
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_ = np.arange(0, 2 * len(places) + 1, 2)
    model.a_matrix_.index_ = np.column_stack([numbers, np.full(len(places), num_items)]).ravel()
    model.a_matrix_.value_ = np.column_stack([np.ones(len(places)), costs / unit]).ravel()
    model.integrality_ = [highspy.HighsVarType.kInteger] * len(places)
    solver = silent_solver()
    solver.setOptionValue("mip_rel_gap", gap / 4)
    solver.passModel(model)
    allowance.run(solver)
    info = solver.getInfo()
    values = np.asarray(solver.getSolution().col_value)
    if info.primal_solution_status == 2 and len(values):
        found = settled.copy()
        is_taken = values > 0.5
        found[places[is_taken, 0]] = places[is_taken, 1]
        is_within = float(cost[rows, found].sum()) <= budget * (1 + 1e-12)
        if is_within and loss[rows, found].sum() < loss[rows, choice].sum():
            choice = found
    # What the core leaves out is no better than the choice at hand.
    best = float(loss[rows, choice].sum())
    dual = info.mip_dual_bound * scale + fixed_loss
    if np.isfinite(dual):
        bound = max(bound, min(dual, best))
    return choice, bound


def silent_solver() -> highspy.Highs:
    """HiGHS greets on stdout when it is made, before it can be told not to; only results belong there."""
    flush = ctypes.CDLL(None).fflush
    sys.stdout.flush()
    flush(None)
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        solver = highspy.Highs()
        flush(None)
    finally:
        os.dup2(own, 1)
        os.close(own)
        os.close(nowhere)
    solver.silent()
    solver.setOptionValue("threads", 1)  # all solvers of a process share their threads, and have to agree
    return solver
