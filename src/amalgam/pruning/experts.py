"""Which experts go, and into which others they are merged.

In: what a survey or saved statistics tell of each expert. Out: the experts that remain, by layer. Must never know:
files.

Criteria, the least of which goes first:

    use        tokens that the router sends to it
    gate-mass  the sum of their gate weights
    reap       the mean, over the tokens that it was sent, of the norm of what it adds, its gate weight included
               (Lasby et al. 2025, "REAP the Experts", eq. 9)
    random     for comparison
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from amalgam.base.counting import counted
from amalgam.errors import ConfigError, UnsupportedError
from amalgam.models.spec import ModelSpec
from amalgam.pruning.amounts import Amount
from amalgam.pruning.survey import LayerExperts

ExpertCriterion = Literal["reap", "gate-mass", "use", "random"]
EXPERT_CRITERIA: tuple[ExpertCriterion, ...] = get_args(ExpertCriterion)
Groups = Mapping[int, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class ExpertChoice:
    """How experts are chosen.

    Attributes:
        merges: what goes is merged into what remains, instead of dropped.
        per_layer: layers may lose different numbers; in all, as many go.
    """

    criterion: ExpertCriterion
    amount: Amount
    merges: bool = False
    per_layer: bool = False
    seed: int = 0


def scores_of(choice: ExpertChoice, layers: Mapping[int, LayerExperts]) -> dict[int, Tensor]:
    """Layer → float64 `[experts]`."""
    if choice.criterion == "random":
        generator = torch.Generator().manual_seed(choice.seed)
        return {
            layer_id: torch.rand(len(each.counts), generator=generator, dtype=torch.float64)
            for layer_id, each in layers.items()
        }
    return {layer_id: _score(choice.criterion, each) for layer_id, each in layers.items()}


def _score(criterion: str, layer: LayerExperts) -> Tensor:
    if criterion == "use":
        return layer.counts
    if criterion == "gate-mass":
        return layer.gate_mass
    return layer.norms / layer.counts.clamp(min=1)


def kept_experts(choice: ExpertChoice, spec: ModelSpec, scores: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """Layer → the experts that remain, in order.

    Raises:
        UnsupportedError: the model has no experts.
        ConfigError: fewer would remain than a token needs, or than groups of experts allow.
    """
    if not spec.moe_layer_ids:
        raise UnsupportedError("The model has no experts.", remedy="Prune layers, channels or weights.")
    counts = {layer_id: spec.layers[layer_id].mlp.num_experts for layer_id in spec.moe_layer_ids}
    gone = {layer_id: choice.amount.of(count) for layer_id, count in counts.items()}
    if not any(gone.values()):
        raise ConfigError(
            f"No expert would go: {choice.amount.text} of {max(counts.values())} experts in a layer.",
            remedy="Let one or more of each layer go.",
        )
    if choice.per_layer:
        gone = _spread(spec, scores, sum(gone.values()))
    kept = {}
    for layer_id, score in scores.items():
        remaining = counts[layer_id] - gone[layer_id]
        least = _least(spec, layer_id)
        if remaining < least:
            raise ConfigError(
                f"Layer {layer_id} would keep {remaining} of its {counts[layer_id]} experts.",
                remedy=f"At least {least} have to remain.",
            )
        kept[layer_id] = _best(score, remaining, _num_groups(spec, layer_id), layer_id)
    return kept


def _num_groups(spec: ModelSpec, layer_id: int) -> int:
    groups = getattr(getattr(spec.layers[layer_id].mlp, "router", None), "groups", None)
    return 1 if groups is None else int(groups.num_groups)


def _least(spec: ModelSpec, layer_id: int) -> int:
    """As many as a token needs; where experts are in groups, in the groups that a token may use."""
    mlp = spec.layers[layer_id].mlp
    groups = getattr(getattr(mlp, "router", None), "groups", None)
    if groups is None or groups.num_groups == 1:
        return mlp.num_active_experts
    return max(2, -(-mlp.num_active_experts // int(groups.num_kept))) * int(groups.num_groups)


def _best(score: Tensor, count: int, num_groups: int, layer_id: int) -> list[int]:
    """The experts with the largest scores, as many of each group; of equals those that come first."""
    if count % num_groups:
        raise ConfigError(
            f"Layer {layer_id} would keep {counted(count, 'expert')}, and the router has {num_groups} groups of "
            "equal size.",
            remedy=f"Let a multiple of {num_groups} remain.",
        )
    each = len(score) // num_groups
    kept: list[int] = []
    for group in range(num_groups):
        part = score[group * each : (group + 1) * each]
        order = part.sort(descending=True, stable=True).indices[: count // num_groups]
        kept += sorted((order + group * each).tolist())
    return kept


def _spread(spec: ModelSpec, scores: Mapping[int, Tensor], total: int) -> dict[int, int]:
    """How many experts each layer loses where the least of all layers go, by their share of the layer's scores."""
    shares = {layer_id: score / score.sum().clamp(min=1e-300) * len(score) for layer_id, score in scores.items()}
    room = {layer_id: len(score) - _least(spec, layer_id) for layer_id, score in scores.items()}
    if any(_num_groups(spec, layer_id) > 1 for layer_id in scores):
        raise UnsupportedError(
            "The router has groups of experts, which have to stay of equal size.", remedy="Leave --per-layer out."
        )
    wanted, gone = total, dict.fromkeys(scores, 0)
    cells = sorted(
        (float(value), layer_id, expert_id)
        for layer_id, share in shares.items()
        for expert_id, value in enumerate(share.tolist())
    )
    for _, layer_id, _ in cells:
        if total and gone[layer_id] < room[layer_id]:
            gone[layer_id] += 1
            total -= 1
    if total:
        raise ConfigError(
            f"{wanted} experts cannot go: {wanted - total} can.", remedy="A token needs more than would remain."
        )
    return gone


def groups_of(
    kept: Mapping[int, Sequence[int]], layers: Mapping[int, LayerExperts], *, merges: bool
) -> dict[int, tuple[tuple[int, ...], ...]]:
    """Layer → for each expert that remains, those that it is made of.

    A merged expert goes to the one that remains whose probabilities at the router go most along with its own (cosine
    over the tokens; Li et al. 2024).
    """
    found = {}
    for layer_id, remaining in kept.items():
        groups = {expert_id: [expert_id] for expert_id in remaining}
        if merges:
            together = layers[layer_id].together
            unit = together.diagonal().clamp(min=1e-300).rsqrt()
            similarity = together * unit[:, None] * unit[None, :]
            for expert_id in range(len(together)):
                if expert_id not in groups:
                    nearest = int(similarity[expert_id, list(remaining)].argmax())
                    groups[remaining[nearest]].append(expert_id)
        found[layer_id] = tuple(tuple(members) for members in groups.values())
    return found
