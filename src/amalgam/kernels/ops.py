"""One function per operator; picks a backend and can report which it picked.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.
Semantics, shapes and types of every operator are those of `amalgam.kernels.reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels import attention, native, panels, reference
from amalgam.kernels.packed import SWIGLU, Activation, AttentionBatch, ExpertTable, PackedWeight
from amalgam.kernels.panels import prepare
from amalgam.kernels.reference import layer_norm, per_head, sigmoid

__all__ = [
    "backends",
    "choose_experts",
    "embedding",
    "layer_norm",
    "linear",
    "moe",
    "paged_attention",
    "per_head",
    "prepare",
    "rms_norm",
    "rotate",
    "sigmoid",
    "swiglu",
    "write_kv",
]

_COMPILED = frozenset(
    {"choose_experts", "embedding", "linear", "moe", "paged_attention", "rms_norm", "rotate", "swiglu", "write_kv"}
)
_NOT_OPERATORS = frozenset({"backends", "prepare"})


def embedding(token_ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """See `reference.embedding`."""
    if panels.supports_embedding(token_ids, weight):
        return panels.embedding(token_ids, weight, dtype)
    return reference.embedding(token_ids, weight, dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear`."""
    if panels.supports_linear(x, weight):
        return panels.linear(x, weight, bias)
    return reference.linear(x, weight, bias)


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: Activation = SWIGLU
) -> Tensor:
    """See `reference.moe`."""
    if panels.supports_moe(x, experts):
        return panels.moe(x, expert_ids, gate_weights, experts, activation)
    return reference.moe(x, expert_ids, gate_weights, experts, activation)


def choose_experts(scores: Tensor, k: int, *, normalises: bool, sum_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """See `reference.choose_experts`."""
    if native.supports_choose_experts(scores):
        return native.choose_experts(scores, k, normalises=normalises, sum_eps=sum_eps)
    return reference.choose_experts(scores, k, normalises=normalises, sum_eps=sum_eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if native.supports_rms_norm(x, weight):
        return native.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotate`."""
    if native.supports_rotate(x, cos, sin):
        return native.rotate(x, cos, sin)
    return reference.rotate(x, cos, sin)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    if native.supports_swiglu(gate, up):
        return native.swiglu(gate, up)
    return reference.swiglu(gate, up)


def write_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
    """See `reference.write_kv`."""
    if attention.supports_write_kv(keys, values, key, value, slot_ids):
        attention.write_kv(keys, values, key, value, slot_ids)
    else:
        reference.write_kv(keys, values, key, value, slot_ids)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `reference.paged_attention`."""
    if attention.supports_paged_attention(query, keys, values, batch):
        return attention.paged_attention(query, keys, values, batch, scale=scale, window=window, sinks=sinks)
    return reference.paged_attention(query, keys, values, batch, scale=scale, window=window, sinks=sinks)


def backends() -> dict[str, str]:
    """Operator → backend on the CPU: what `GET /model_info` and `amalgam bench` report.

    Products run compiled where their weight is in panels, which `prepare` makes of every layout that fits.
    """
    compiled = f"native ({native.isa()})" if native.is_available() else "torch"
    return {name: compiled if name in _COMPILED else "torch" for name in __all__ if name not in _NOT_OPERATORS}
