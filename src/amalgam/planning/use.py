"""How much the traffic uses each expert.

In: a saved set of expert statistics, or the texts that sensitivities were measured on. Out: gate mass and activations a
token, by layer and expert. Must never know: precisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from amalgam.errors import ConfigError
from amalgam.experts.history import Tally
from amalgam.experts.saved.sets import SavedSet
from amalgam.models.spec import ModelSpec
from amalgam.planning.problem import Problem
from amalgam.planning.sensitivity import Sensitivities

MIN_TOKENS = 256
EVEN = 0.15  # coefficient of variation of the use, below which weighting by it decides next to nothing

Cell = tuple[int, int]  # layer and expert


@dataclass(frozen=True)
class Use:
    """Of each expert, a token's share.

    Attributes:
        where: what was counted, for people.
        mass: sum of gate weights per token.
        activations: how often a token activates it.
    """

    where: str
    num_tokens: int
    mass: Mapping[Cell, float]
    activations: Mapping[Cell, float]

    @property
    def unevenness(self) -> float:
        """Coefficient of variation of the mass within a layer, the mean over the layers: 0 where all are used alike."""
        layers: dict[int, list[float]] = {}
        for (layer, _), mass in self.mass.items():
            layers.setdefault(layer, []).append(mass)
        found = [float(np.std(values) / np.mean(values)) for values in layers.values() if np.mean(values) > 0]
        return float(np.mean(found)) if found else 0.0

    def remark(self) -> str:
        """Whether weighting by use can matter."""
        if not self.mass:
            return "The model has no experts: every weight is used by every token."
        spread = self.unevenness
        if spread < EVEN:
            return (
                f"Use is too even for weighting to matter ({self.where}): within a layer it varies by {spread:.0%} of "
                "its mean. The plan rests on sensitivities."
            )
        return f"Use ({self.where}) varies by {spread:.0%} of its mean within a layer."


def use_of_texts(problem: Problem, sensitivities: Sensitivities) -> Use:
    """As the texts used the experts that the sensitivities were measured on; an expert that none reached counts half
    an activation, since it is not known that none will."""
    mass: dict[Cell, float] = {}
    activations: dict[Cell, float] = {}
    tokens = sensitivities.num_tokens
    for item in problem.items:
        if item.layer is None or item.expert is None or item.name not in sensitivities.weights:
            continue
        found = sensitivities.weights[item.name]
        mean = found.gate_mass / found.num_tokens if found.num_tokens else 0.1
        mass[item.layer, item.expert] = (found.gate_mass + mean / 2) / tokens
        activations[item.layer, item.expert] = (found.num_tokens + 0.5) / tokens
    return Use("the calibration texts", tokens, mass, activations)


def use_of_set(saved: SavedSet, spec: ModelSpec, where: str) -> Use:
    """
    Raises:
        ConfigError: it is of another model, or of too few tokens.
    """
    saved.check_fits(spec.moe_layer_ids, spec.expert_counts, where, spec.num_active_experts)
    tokens = int(saved.total.num_tokens.sum())
    if tokens < MIN_TOKENS:
        raise ConfigError(
            f"{where} has {tokens} tokens, too few to tell which experts the traffic uses.",
            remedy=f"Collect at least {MIN_TOKENS}, or leave --use out: then the calibration texts count.",
        )
    return use_of_tally(saved.total, saved.layer_ids, where, saved.expert_counts)


def use_of_tally(tally: Tally, layer_ids: Sequence[int], where: str, expert_counts: Sequence[int]) -> Use:
    """What was counted of some tokens; an expert that none reached counts half an activation.

    Args:
        expert_counts: experts of each layer.
    """
    tokens = int(tally.num_tokens.sum())
    counts, masses = tally.counts.sum(axis=0), tally.gate_mass.sum(axis=0)
    mass: dict[Cell, float] = {}
    activations: dict[Cell, float] = {}
    for row, layer in enumerate(layer_ids):
        mean = float(masses[row].sum() / max(1, counts[row].sum()))
        for expert in range(expert_counts[row]):
            mass[layer, expert] = (float(masses[row, expert]) + mean / 2) / tokens
            activations[layer, expert] = (float(counts[row, expert]) + 0.5) / tokens
    return Use(where, tokens, mass, activations)
