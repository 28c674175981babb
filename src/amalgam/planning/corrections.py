"""Sensitivities checked against divergences as they are, in groups of weights.

In: expected losses, a plan near the budget. Out: a factor for each weight. Must never know: budgets.

To second order, divergences add up. As they are, errors of early layers also send tokens to other experts, which no
gradient sees, and grow or fade on their way. So weights are taken back to base group by group (a part of a band of
layers: the `down` of layers 0 to 3), the divergence that this removes from a plan near the budget is measured, and the
expected losses of the group are scaled to it, as far as the measurement is certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from amalgam.composition.progress import Progress
from amalgam.planning.losses import Floats
from amalgam.planning.problem import Item, Problem
from amalgam.planning.proof import Scale

MAX_GROUPS = 21
_SPREAD = 0.5  # how far factors of groups are taken to lie apart before anything is measured, as a share


@dataclass(frozen=True)
class Check:
    """One group.

    Attributes:
        expected, measured: what taking it back to base removes from the divergence.
        error: standard error of `measured`.
        factor: of the group's losses.
    """

    part: str
    first_layer: int
    last_layer: int
    expected: float
    measured: float
    error: float
    factor: float


def corrected(
    problem: Problem,
    losses: Floats,
    scale: Scale,
    background: Sequence[int],
    *,
    max_groups: int = MAX_GROUPS,
    progress: Progress | None = None,
) -> tuple[Floats, list[Check]]:
    """The losses with each group's factor, and how it came about.

    Args:
        background: the plan that groups are taken back from.
    """
    groups = _groups(problem, max_groups)
    rows = np.arange(len(losses))
    expected_all = losses[rows, np.asarray(background)]
    whole = float(scale.figures("the background", background).divergence.mean())
    mean = whole / float(expected_all.sum()) if expected_all.sum() > 0 else 1.0
    result, checks = losses * mean, []
    for number, ((part, first, last), members) in enumerate(groups.items()):
        if progress is not None:
            progress("Checking sensitivities", number, len(groups))
        expected = float(expected_all[members].sum())
        if expected <= 0:
            continue
        without = list(background)
        for row in members:
            without[row] = int(losses[row].argmin())
        removed, error = scale.mean_difference(background, without)
        # Weighted by certainty (Gauss): what is expected of any group, and what was measured of this one.
        noise, prior = error / expected, _SPREAD * mean
        share = prior**2 / (prior**2 + noise**2)
        factor = max(mean / 10, mean + share * (removed / expected - mean))
        result[members] = losses[members] * factor
        checks.append(Check(part, first, last, expected, removed, error, factor))
    if progress is not None:
        progress("Checking sensitivities", len(groups), len(groups))
    return result, checks


def _groups(problem: Problem, most: int) -> dict[tuple[str, int, int], list[int]]:
    """Part and band of layers → rows of the losses."""
    layers = sorted({item.layer for item in problem.items if item.layer is not None})
    parts = list(dict.fromkeys(_part(item) for item in problem.items if item.layer is not None))
    if not parts:
        return {}
    num_bands = max(1, min(len(layers), most // len(parts)))
    bands = [list(map(int, band)) for band in np.array_split(np.array(layers), num_bands)]
    band_of = {layer: (band[0], band[-1]) for band in bands for layer in band}
    found: dict[tuple[str, int, int], list[int]] = {}
    for row, item in enumerate(problem.items):
        if item.layer is not None:
            found.setdefault((_part(item), *band_of[item.layer]), []).append(row)
    return found


def _part(item: Item) -> str:
    return f"{item.role} {item.part}"
