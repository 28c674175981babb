"""One function per operator: the compiled one where it takes the arguments, else the reference.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.
Semantics, shapes and types of every operator are those of `amalgam.kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.kernels import attention, native, panels, reference
from amalgam.kernels.packed import SWIGLU, Activation, AttentionBatch, ExpertTable, PackedWeight
from amalgam.kernels.panels import prepare
from amalgam.kernels.reference import layer_norm, per_head, sigmoid

__all__ = [
    "add_rms_norm",
    "cached_attention",
    "embedding",
    "layer_norm",
    "linear",
    "linears",
    "moe",
    "paged_attention",
    "per_head",
    "prepare",
    "rms_norm",
    "rotate",
    "route",
    "sigmoid",
    "swiglu",
    "write_kv",
]


def embedding(token_ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """See `reference.embedding`."""
    if panels.supports_embedding(token_ids, weight):
        return panels.embedding(token_ids, weight, dtype)
    return reference.embedding(token_ids, weight, dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """See `reference.linear`."""
    if panels.supports_linear(x, weight):
        return panels.linear(x, weight, bias, out_dtype)
    return reference.linear(x, weight, bias, out_dtype)


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: Activation = SWIGLU
) -> Tensor:
    """See `reference.moe`."""
    if panels.supports_moe(x, experts):
        return panels.moe(x, expert_ids, gate_weights, experts, activation)
    return reference.moe(x, expert_ids, gate_weights, experts, activation)


def linears(x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None) -> list[Tensor]:
    """`linear` of the same rows with several weights."""
    biases = (None,) * len(weights) if biases is None else biases
    if all(panels.supports_linear(x, weight) for weight in weights):
        return panels.linears(x, weights, biases)
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def route(x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """See `reference.route`."""
    if panels.supports_route(x, weight):
        return panels.route(x, weight, k, normalises=normalises, sum_eps=sum_eps)
    return reference.route(x, weight, k, normalises=normalises, sum_eps=sum_eps)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if native.supports_rms_norm(x, weight):
        return native.add_rms_norm(x, delta, weight, eps)
    return reference.add_rms_norm(x, delta, weight, eps)


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


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    slot_ids: Tensor,
    batch: AttentionBatch,
    norms: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    rotary: tuple[Tensor, Tensor] | None,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Norm and rotate the heads, write keys and values to the cache, attend over it.

    Args:
        query, key, value: projections, `[tokens, heads × d]`, `[tokens, kv_heads × d]`, `[tokens, kv_heads × v]`.
        keys, values: the layer's cache, `[slots, kv_heads, d]` and `[slots, kv_heads, v]`.
        slot_ids: int64 `[tokens]`, where each token's key and value go.
        norms: weights `[d]` of the RMSNorm over every query head and every key head; None: no norm.
        rotary: cos and sin, float32 `[tokens, r / 2]`; None: no rotation.
        scale, window, sinks: as in `reference.paged_attention`.

    Returns `[tokens, heads × v]` in query's type.
    """
    if attention.supports_cached_attention(query, key, value, keys, values, batch):
        return attention.cached_attention(
            query,
            key,
            value,
            keys=keys,
            values=values,
            slot_ids=slot_ids,
            batch=batch,
            norms=norms,
            norm_eps=norm_eps,
            rotary=rotary,
            scale=scale,
            window=window,
            sinks=sinks,
        )
    tokens, dim = query.shape[0], keys.shape[2]
    queries, new_keys = query.view(tokens, -1, dim), key.view(tokens, -1, dim)
    if norms is not None:
        queries, new_keys = rms_norm(queries, norms[0], norm_eps), rms_norm(new_keys, norms[1], norm_eps)
    if rotary is not None:
        queries, new_keys = rotate(queries, *rotary), rotate(new_keys, *rotary)
    write_kv(keys, values, new_keys, value.view(tokens, *values.shape[1:]), slot_ids)
    attended = paged_attention(queries, keys, values, batch, scale=scale, window=window, sinks=sinks)
    return attended.flatten(1)
