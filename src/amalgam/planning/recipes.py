"""Plans that others would make, for the same budget: what ours has to beat.

In: a problem and its costs. Out: choices. Must never know: texts, measurements of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from amalgam.planning.knapsack import solve
from amalgam.planning.losses import Floats, table
from amalgam.planning.problem import Item, Problem
from amalgam.planning.use import Use

Choice = list[int]


def cost_of(choice: Sequence[int], cost: Floats) -> float:
    return float(cost[np.arange(len(cost)), np.asarray(choice)].sum())


def uniforms(problem: Problem, cost: Floats, budget: float) -> dict[str, Choice]:
    """Source → all weights from it, where that is within the budget."""
    found = {source: problem.uniform(source) for source in problem.sources}
    return {
        source: choice
        for source, choice in found.items()
        if choice is not None and cost_of(choice, cost) <= budget * (1 + 1e-9)
    }


def usage_only(problem: Problem, cost: Floats, budget: float, use: Use) -> Choice:
    """By use alone: an error is taken to be the number of weights times 4^-bits, times use."""
    values = {
        item.name: {
            option.source: _mass(item, use) * item.num_weights * 4.0 ** -(8 * option.stored_bytes / item.num_weights)
            for option in item.options
        }
        for item in problem.items
    }
    return [int(index) for index in solve(table(problem, values), cost, budget).choice]


def random_plan(problem: Problem, cost: Floats, budget: float, seed: int) -> Choice:
    """Weights in a random order take random wider options as long as the budget lasts."""
    generator = np.random.default_rng(seed)
    choice = [int(index) for index in cost.argmin(axis=1)]
    left = budget - cost_of(choice, cost)
    for row in generator.permutation(np.repeat(np.arange(len(problem.items)), 2)):
        option = int(generator.integers(len(problem.items[row].options)))
        extra = cost[row, option] - cost[row, choice[row]]
        if 0 < extra <= left:
            choice[row] = option
            left -= extra
    return choice


def hand_recipes(problem: Problem, cost: Floats, budget: float) -> Iterator[tuple[str, Choice]]:
    """Attention, shared experts and dense weights wide; `down` one step above gate and up (Unsloth, AesSedai,
    ubergarm). Every such recipe within the budget, by its three sources; the largest first."""
    found: list[tuple[float, str, Choice]] = []
    ranks = {source: rank for rank, source in enumerate(problem.sources)}
    bits = {source: problem.bits_of(source) for source in problem.sources}
    for narrow, down, wide in product(problem.sources, repeat=3):
        if not ranks[narrow] < ranks[down] <= ranks[wide] or bits[down] - bits[narrow] < 0.5:
            continue
        choice = _recipe(problem, narrow, down, wide)
        if choice is None:
            continue
        size = cost_of(choice, cost)
        if size <= budget * (1 + 1e-9):
            found.append((size, f"{wide} / down {down} / gate, up {narrow}", choice))
    for _, name, choice in sorted(found, key=lambda entry: -entry[0]):
        yield name, choice


def _recipe(problem: Problem, narrow: str, down: str, wide: str) -> Choice | None:
    choice: Choice = []
    for item in problem.items:
        index = item.index_of(_wanted(item, narrow, down, wide))
        if index is None:
            return None
        choice.append(index)
    return choice


def _wanted(item: Item, narrow: str, down: str, wide: str) -> str:
    if item.role not in {"expert", "mlp"}:
        return wide
    return down if item.part in {"down", "fc2", "proj"} else narrow


def _mass(item: Item, use: Use) -> float:
    return 1.0 if item.layer is None or item.expert is None else use.mass[item.layer, item.expert]
