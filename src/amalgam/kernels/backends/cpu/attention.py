"""Compiled attention over a paged cache, and the write to that cache, on torch tensors.

In: CPU tensors and an `AttentionBatch`. Out: activations with the meaning that the reference gives. A token's bits
depend neither on its neighbours, nor on how its prompt was cut into chunks, nor on the number of threads.
Must never know: plans of precisions, requests, layers.

With a query and a cache in bfloat16, products are of bfloat16 pairs summed in float32, and the softmax's weights are
rounded to bfloat16 before they multiply the values; their total is that of the rounded weights. Otherwise everything is
float32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.step import AttentionBatch

if TYPE_CHECKING:
    from amalgam import _native

# The plan of a batch, made by the first layer that attends outside a compiled program.
_PLANS: WeakKeyDictionary[AttentionBatch, _native.AttentionPlan] = WeakKeyDictionary()


def supports_paged_attention(query: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch) -> bool:
    """Whether `paged_attention` takes these tensors; depends on types and devices only."""
    return (
        extension.is_available()
        and query.dtype in extension.FLOAT_TYPES
        and keys.dtype in extension.FLOAT_TYPES
        and values.dtype in extension.FLOAT_TYPES
        and query.is_cpu
        and keys.is_cpu
        and values.is_cpu
        and batch.block_tables.is_cpu
    )


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
    """Causal attention over a paged cache; see `operators.paged_attention`.

    query: `[tokens, heads, d]`; keys: `[slots, kv_heads, d]`; values: `[slots, kv_heads, v]`; float32 or bfloat16 each.
    sinks: `[heads]`. Returns `[tokens, heads, v]` in query's type.

    Raises:
        ValueError: shapes, types or block tables that do not fit together.
    """
    plan = plan_of(batch)
    tokens, heads, key_dim = query.shape
    slots, kv_heads, value_dim = values.shape
    if (
        keys.shape != (slots, kv_heads, key_dim)
        or heads % kv_heads
        or plan.num_tokens != tokens
        or plan.num_slots > slots
        or not supports_paged_attention(query, keys, values, batch)
        or (window is not None and window < 1)
        or (sinks is not None and sinks.shape != (heads,))
    ):
        raise ValueError(
            f"attention of {query.dtype} {tuple(query.shape)} over {keys.dtype} {tuple(keys.shape)} and {values.dtype} "
            f"{tuple(values.shape)} with {plan.num_tokens} tokens, {plan.num_slots} slots, window {window} and sinks "
            f"{None if sinks is None else tuple(sinks.shape)}; expected float32 or bfloat16 [tokens, heads, d], "
            "[slots, kv_heads, d] and [slots, kv_heads, v] on cpu, heads a multiple of kv_heads, a window of at least 1"
        )
    query, keys, values = _dense_rows(query), _dense_rows(keys), _dense_rows(values)
    out = torch.empty((tokens, heads, value_dim), dtype=query.dtype)
    if sinks is not None:
        sinks = sinks.to("cpu", torch.float32).contiguous()
    if out.numel():
        token_stride, head_stride, _ = query.stride()
        key_slot, key_head, _ = keys.stride()
        value_slot, value_head, _ = values.stride()
        table(extension.isa()).attend(
            plan,
            query.data_ptr(),
            query.dtype is torch.bfloat16,
            token_stride,
            head_stride,
            heads,
            keys.data_ptr(),
            keys.dtype is torch.bfloat16,
            key_slot,
            key_head,
            key_dim,
            values.data_ptr(),
            values.dtype is torch.bfloat16,
            value_slot,
            value_head,
            value_dim,
            kv_heads,
            out.data_ptr(),
            scale,
            window or 0,
            0 if sinks is None else sinks.data_ptr(),
            torch.get_num_threads(),
        )
    return out


def supports_cached_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: AttentionBatch
) -> bool:
    """Whether `cached_attention` takes these tensors; depends on types, devices and the cache's layout only."""
    return (
        query.dtype is key.dtype is value.dtype is keys.dtype is values.dtype
        and supports_paged_attention(query, keys, values, batch)
        and key.is_cpu
        and value.is_cpu
        and keys.is_contiguous()
        and values.is_contiguous()
    )


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
    """See `Operators.cached_attention`, which all of this is in one call.

    Raises:
        ValueError: shapes or types that do not fit together.
        IndexError: a slot that the cache does not have; nothing is written.
    """
    plan = plan_of(batch)
    tokens = query.shape[0]
    slots, kv_heads, dim = keys.shape
    value_dim = values.shape[2]
    heads = query.shape[1] // dim if dim else 0
    cos, sin = rotary or (None, None)
    query_norm, key_norm = norms or (None, None)
    if (
        not supports_cached_attention(query, key, value, keys, values, batch)
        or query.shape != (tokens, heads * dim)
        or key.shape != (tokens, kv_heads * dim)
        or value.shape != (tokens, kv_heads * value_dim)
        or values.shape != (slots, kv_heads, value_dim)
        or heads % kv_heads
        or plan.num_tokens != tokens
        or plan.num_slots > slots
        or slot_ids.shape != (tokens,)
        or slot_ids.dtype is not torch.int64
        or (window is not None and window < 1)
        or (sinks is not None and sinks.shape != (heads,))
        or any(norm is not None and not _is_norm(norm, dim) for norm in (query_norm, key_norm))
        or (query_norm is not None and key_norm is not None and query_norm.dtype is not key_norm.dtype)
        or (cos is not None and sin is not None and not _is_rotary(cos, sin, tokens, dim))
    ):
        raise ValueError(
            f"attention of {query.dtype} {tuple(query.shape)}, {key.dtype} {tuple(key.shape)} and {value.dtype} "
            f"{tuple(value.shape)} over caches of {keys.dtype} {tuple(keys.shape)} and {values.dtype} "
            f"{tuple(values.shape)} with {plan.num_tokens} tokens, {plan.num_slots} slots and window {window}"
        )
    out = torch.empty((tokens, heads * value_dim), dtype=query.dtype)
    if not out.numel():
        return out
    query, key, value = (part if part.stride(1) == 1 else part.contiguous() for part in (query, key, value))
    slot_ids = slot_ids.contiguous()
    if query_norm is not None and key_norm is not None:
        query_norm, key_norm = query_norm.contiguous(), key_norm.contiguous()
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    if sinks is not None:
        sinks = sinks.to("cpu", torch.float32).contiguous()
    table(extension.isa()).attend_cached(
        extension.kernels(),
        plan,
        query.data_ptr(),
        query.stride(0),
        key.data_ptr(),
        key.stride(0),
        value.data_ptr(),
        value.stride(0),
        query.dtype is torch.bfloat16,
        heads,
        kv_heads,
        dim,
        value_dim,
        0 if query_norm is None else query_norm.data_ptr(),
        0 if key_norm is None else key_norm.data_ptr(),
        query_norm is not None and query_norm.dtype is torch.bfloat16,
        norm_eps,
        0 if cos is None else cos.data_ptr(),
        0 if sin is None else sin.data_ptr(),
        0 if cos is None else cos.shape[1],
        keys.data_ptr(),
        values.data_ptr(),
        slot_ids.data_ptr(),
        slots,
        out.data_ptr(),
        scale,
        window or 0,
        0 if sinks is None else sinks.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _is_norm(weight: Tensor, dim: int) -> bool:
    return weight.shape == (dim,) and weight.dtype in extension.FLOAT_TYPES and weight.is_cpu


def _is_rotary(cos: Tensor, sin: Tensor, tokens: int, dim: int) -> bool:
    return (
        cos.dtype is sin.dtype is torch.float32
        and cos.shape == sin.shape
        and cos.dim() == 2
        and cos.shape[0] == tokens
        and 2 * cos.shape[1] <= dim
        and cos.is_cpu
        and sin.is_cpu
    )


def supports_write_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_ids: Tensor) -> bool:
    """Whether `write_kv` takes these tensors; depends on types, devices and the cache's layout only."""
    return (
        extension.is_available()
        and key.dtype is keys.dtype
        and value.dtype is values.dtype
        and slot_ids.dtype is torch.int64
        and keys.is_cpu
        and values.is_cpu
        and key.is_cpu
        and value.is_cpu
        and slot_ids.is_cpu
        and keys.is_contiguous()
        and values.is_contiguous()
    )


def write_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
    """`keys[slot_ids[t]] = key[t]`, likewise values; of the same type each, the caches contiguous.

    Raises:
        ValueError: shapes or types that do not fit together.
        IndexError: a slot that the cache does not have; nothing is written.
    """
    tokens = slot_ids.shape[0]
    slots = keys.shape[0]
    if (
        key.shape != (tokens, *keys.shape[1:])
        or value.shape != (tokens, *values.shape[1:])
        or values.shape[0] != slots
        or not supports_write_kv(keys, values, key, value, slot_ids)
    ):
        raise ValueError(
            f"write of {key.dtype} {tuple(key.shape)} and {value.dtype} {tuple(value.shape)} to {keys.dtype} "
            f"{tuple(keys.shape)} and {values.dtype} {tuple(values.shape)} at {slot_ids.dtype} {tuple(slot_ids.shape)}"
        )
    if tokens == 0:
        return
    from amalgam import _native

    key, value, slot_ids = key.contiguous(), value.contiguous(), slot_ids.contiguous()
    key_bytes, value_bytes = key.nbytes // tokens, value.nbytes // tokens
    _native.write_kv(
        key.data_ptr(),
        key_bytes,
        keys.data_ptr(),
        key_bytes,
        key_bytes,
        value.data_ptr(),
        value_bytes,
        values.data_ptr(),
        value_bytes,
        value_bytes,
        slot_ids.data_ptr(),
        tokens,
        slots,
        torch.get_num_threads(),
    )


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def plan_of(batch: AttentionBatch) -> _native.AttentionPlan:
    """The batch's sequences as the kernels read them."""
    plan = _PLANS.get(batch)
    if plan is None:
        plan = _PLANS[batch] = _make_plan(batch)
    return plan


def _make_plan(batch: AttentionBatch) -> _native.AttentionPlan:
    from amalgam import _native

    starts, lengths, tables = batch.query_starts, batch.context_lengths, batch.block_tables
    if (
        not starts.dtype == lengths.dtype == tables.dtype == torch.int64
        or starts.shape != (len(lengths) + 1,)
        or tables.shape[0] != len(lengths)
        or tables.dim() != 2
        or not (starts.is_cpu and lengths.is_cpu and tables.is_cpu)
    ):
        raise ValueError(
            f"an attention batch of {starts.dtype} {tuple(starts.shape)}, {lengths.dtype} {tuple(lengths.shape)} and "
            f"{tables.dtype} {tuple(tables.shape)}; expected int64 [sequences + 1], [sequences] and [sequences, blocks]"
        )
    starts, lengths, tables = starts.contiguous(), lengths.contiguous(), tables.contiguous()
    return _native.AttentionPlan(
        starts.data_ptr(),
        lengths.data_ptr(),
        len(lengths),
        tables.data_ptr(),
        tables.stride(0),
        tables.shape[1],
        batch.block_size,
    )


@functools.cache
def table(isa: str) -> _native.AttentionKernels:
    from amalgam import _native

    return _native.attention_kernels(isa)
