"""Scores of experts → which of them a token goes to, and with which weights: the specification.

In: a router's scores. Out: ids and weights. Must never know: experts' weights, layers, how scores are computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from amalgam.kernels.program import Route


def choose_experts(scores: Tensor, one: Route, sigmoid: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Ids int64 and weights float32, `[tokens, k]`, of the experts that a `Route` chooses.

    Args:
        scores: x Wᵀ + b, float32 `[tokens, experts]`.
        one: how; its weight, bias and x are not looked at.
        sigmoid: of float32.
    """
    if one.scoring == "mixer":
        return _mixed(scores, one)
    if one.scoring == "softmax":
        scores = torch.softmax(scores, dim=-1)
    elif one.scoring == "sigmoid":
        scores = sigmoid(scores)
    choice = scores if one.correction is None else scores + one.correction.float()
    if one.num_kept < one.num_groups:
        choice = _in_best_groups(choice, one)
    expert_ids = torch.topk(choice, one.k, dim=-1).indices
    gate_weights = scores.gather(1, expert_ids)
    if one.scoring == "chosen":
        gate_weights = torch.softmax(gate_weights, dim=-1)
    elif one.scoring == "apart":
        gate_weights = sigmoid(gate_weights)
    if one.normalises:
        gate_weights = gate_weights / (gate_weights.sum(-1, keepdim=True) + one.sum_eps)
    gate_weights = gate_weights * one.scaling
    if one.factors is not None:
        gate_weights = gate_weights * one.factors.float()[expert_ids]
    return expert_ids, gate_weights


def _in_best_groups(choice: Tensor, one: Route) -> Tensor:
    """Scores of experts outside the best groups become the least that a score can be."""
    groups = choice.unflatten(-1, (one.num_groups, -1))
    sizes = min(2, groups.shape[-1]) if one.scoring == "sigmoid" else 1
    best = groups.topk(sizes, dim=-1).values.sum(-1).topk(one.num_kept, dim=-1).indices
    is_kept = torch.zeros(groups.shape[:2], dtype=torch.bool, device=choice.device).scatter(1, best, True)
    fill = 0.0 if one.scoring == "softmax" else -torch.inf
    return choice.masked_fill(~is_kept.repeat_interleave(groups.shape[-1], dim=1), fill)


def _mixed(scores: Tensor, one: Route) -> tuple[Tensor, Tensor]:
    candidates, ids, weights = scores, [], []
    for _ in range(one.k):
        best, expert_id = candidates.max(dim=-1, keepdim=True)
        distance = (best - scores) / torch.maximum(scores.abs(), best)
        near = candidates.masked_fill(distance > 2 * one.jitter, -torch.inf)
        ids.append(expert_id)
        weights.append(torch.softmax(near, dim=-1).gather(1, expert_id))
        candidates = candidates.scatter(1, expert_id, -torch.inf)
    return torch.cat(ids, dim=-1), torch.cat(weights, dim=-1)
