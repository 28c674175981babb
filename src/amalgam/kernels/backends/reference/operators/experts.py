"""Mixtures of experts: routing, and what the experts that are chosen make of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels.backends.reference.operators.elementwise import gated
from amalgam.kernels.backends.reference.operators.products import linear
from amalgam.kernels.weights import SWIGLU, ExpertTable, GatedActivation, PackedWeight


def route(x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """The k experts of the largest softmax probability (Shazeer et al. 2017), the first choice first; in float32.

    Args:
        x: `[tokens, hidden]`.
        weight: of the router, `[experts, hidden]`.
        normalises: divide the k probabilities by their sum + `sum_eps`.

    Returns ids int64 and gate weights float32, both `[tokens, k]`.
    """
    scores = linear(x.float(), weight)
    gate_weights, expert_ids = torch.topk(torch.softmax(scores, dim=-1), k, dim=-1)
    if normalises:
        gate_weights = gate_weights / (gate_weights.sum(-1, keepdim=True) + sum_eps)
    return expert_ids, gate_weights


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: GatedActivation = SWIGLU
) -> Tensor:
    """Mixture of experts: `Σₖ gate_weights[t, k] × expert(expert_ids[t, k])(x[t])`, each expert a gated MLP.

    x: `[tokens, hidden]`; expert_ids: int64 and gate_weights: float, both `[tokens, k]`. Returns `[tokens, hidden]`.
    An id of -1 is no choice and adds nothing, whatever its gate weight. Loops over the active experts only; the sum
    over k has a fixed order.
    """
    outputs = x.new_empty((*expert_ids.shape, x.shape[1]), dtype=torch.float32)
    expert_outputs(x, expert_ids, experts, activation, outputs)
    return weighted_sum(outputs, expert_ids, gate_weights, x.dtype)


def expert_outputs(
    x: Tensor,
    expert_ids: Tensor,
    experts: ExpertTable,
    activation: GatedActivation,
    out: Tensor,
    *,
    num_threads: int | None = None,
) -> None:
    """out[t, k] = expert(expert_ids[t, k])(x[t]), rounded to x's type, in float32 `[tokens, k, hidden]`.

    Left alone where an id is -1.

    Args:
        num_threads: of compiled operators; no matter here.
    """
    k, flat = expert_ids.shape[1], expert_ids.flatten()
    outputs = out.view(-1, out.shape[-1])
    order = torch.argsort(flat, stable=True)
    start, *counts = torch.bincount(flat + 1, minlength=len(experts) + 1).tolist()
    for expert_id, count in enumerate(counts):
        if count == 0:
            continue
        rows = order[start : start + count]
        start += count
        expert = experts[expert_id]
        inputs = x[rows // k]
        gate = linear(inputs, expert.gate, expert.gate_bias)
        up = linear(inputs, expert.up, expert.up_bias)
        outputs[rows] = linear(gated(gate, up, activation), expert.down, expert.down_bias).float()


def weighted_sum(outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σₖ gate_weights[t, k] × outputs[t, k]` in float32, in the order of k, but for those whose id is -1.

    outputs: float32 `[tokens, k, hidden]`; expert_ids, gate_weights: `[tokens, k]`. Returns `[tokens, hidden]` in
    `dtype`.
    """
    is_none = (expert_ids == -1).unsqueeze(-1)
    parts = (outputs * gate_weights.float().unsqueeze(-1)).masked_fill(is_none, 0.0)
    total = parts[:, 0]
    for slot in range(1, outputs.shape[1]):
        total = total + parts[:, slot]
    return total.to(dtype)
