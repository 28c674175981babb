"""Sensitivity × use → what each option is expected to cost in KL divergence.

In: a problem, sensitivities, use. Out: losses `[items, options]` in nats a token. Must never know: budgets.

An expert's divergence was measured over the gate mass that the texts gave it; with other traffic it changes as the mass
does. Of an expert that few tokens reached, the figures are mixed with what its rounding error would do on the mean of
its layer, as if `_PRIOR_TOKENS` more tokens had reached it. A gate multiplies the expert's error, so that a token's
divergence goes by the square of its gate: an expert with small gates is not taken to matter as much as the others do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from amalgam.planning.problem import Item, Problem
from amalgam.planning.sensitivity import Sensitivities, WeightErrors
from amalgam.planning.use import Use

Floats = npt.NDArray[np.float64]
_PRIOR_TOKENS = 16


def table(problem: Problem, value_of: Mapping[str, Mapping[str, float]]) -> Floats:
    """Name → source → value as an array `[items, options]`, infinity where there is no such option."""
    width = max(len(item.options) for item in problem.items)
    result = np.full((len(problem.items), width), np.inf)
    for row, item in enumerate(problem.items):
        for column, option in enumerate(item.options):
            result[row, column] = value_of[item.name][option.source]
    return result


def costs(problem: Problem, kind: str) -> Floats:
    """Bytes of each option, `stored` or `memory`; infinity where there is none."""
    values = {
        item.name: {
            option.source: float(option.stored_bytes if kind == "stored" else option.memory_bytes)
            for option in item.options
        }
        for item in problem.items
    }
    return table(problem, values)


def losses(problem: Problem, sensitivities: Sensitivities, use: Use | None) -> Floats:
    """What each option is expected to add to the divergence.

    Args:
        use: None: as if a layer's experts were all used alike.
    """
    priors = _priors(problem, sensitivities)
    usual = _usual(problem, sensitivities)
    own = _mean_mass(problem, sensitivities)
    values: dict[str, dict[str, float]] = {}
    for item in problem.items:
        found = sensitivities.weights.get(item.name)
        values[item.name] = {
            option.source: _loss(item, option.source, found, priors, usual, own, sensitivities.num_tokens, use)
            for option in item.options
        }
    return table(problem, values)


def _loss(
    item: Item,
    source: str,
    found: WeightErrors | None,
    priors: Mapping[tuple[int | None, str], float],
    usual: Mapping[int | None, float],
    even: Mapping[int | None, tuple[float, float]],
    num_tokens: int,
    use: Use | None,
) -> float:
    if found is None:
        return 0.0
    error = found.options[source]
    if item.expert is None or item.layer is None:
        # What no gradient has seen is not free, but like the others.
        return error.divergence if found.num_tokens else usual.get(item.layer, 0.0) * error.rounding_error
    mean_mass, mean_gate = even[item.layer]
    gate = (found.gate_mass + _PRIOR_TOKENS * mean_gate) / (found.num_tokens + _PRIOR_TOKENS)
    prior = priors[item.layer, item.part] * error.rounding_error * gate**2
    total = error.divergence * num_tokens + _PRIOR_TOKENS * prior
    mass = mean_mass if use is None else use.mass[item.layer, item.expert]
    return total / (found.gate_mass + _PRIOR_TOKENS * gate) * mass


def _priors(problem: Problem, sensitivities: Sensitivities) -> dict[tuple[int | None, str], float]:
    """Divergence per square of a gate and rounding error, of a layer's experts together, for gate, up and down."""
    above: dict[tuple[int | None, str], float] = defaultdict(float)
    below: dict[tuple[int | None, str], float] = defaultdict(float)
    for item in problem.items:
        found = sensitivities.weights.get(item.name)
        if found is None or item.expert is None or not found.num_tokens:
            continue
        squares = found.gate_mass**2 / found.num_tokens
        for error in found.options.values():
            above[item.layer, item.part] += error.divergence * sensitivities.num_tokens
            below[item.layer, item.part] += squares * error.rounding_error
    return {key: value / below[key] if below[key] else 0.0 for key, value in above.items()}


def _usual(problem: Problem, sensitivities: Sensitivities) -> dict[int | None, float]:
    """Layer → divergence per rounding error of its weights that all tokens reach, and that were seen."""
    sums: dict[int | None, list[float]] = {}
    for item in problem.items:
        found = sensitivities.weights.get(item.name)
        if found is None or item.expert is not None or not found.num_tokens:
            continue
        entry = sums.setdefault(item.layer, [0.0, 0.0])
        for error in found.options.values():
            entry[0] += error.divergence
            entry[1] += error.rounding_error
    return {layer: above / below if below else 0.0 for layer, (above, below) in sums.items()}


def _mean_mass(problem: Problem, sensitivities: Sensitivities) -> dict[int | None, tuple[float, float]]:
    """Layer → gate mass a token of an expert on the mean, and of one activation."""
    sums: dict[int | None, list[float]] = {}
    for item in problem.items:
        found = sensitivities.weights.get(item.name)
        if found is not None and item.expert is not None:
            entry = sums.setdefault(item.layer, [0.0, 0.0, 0.0])
            entry[0] += found.gate_mass
            entry[1] += found.num_tokens
            entry[2] += 1
    tokens = sensitivities.num_tokens
    return {
        layer: (mass / count / tokens, mass / activations if activations else 0.0)
        for layer, (mass, activations, count) in sums.items()
    }
