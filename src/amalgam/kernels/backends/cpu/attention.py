"""Compiled attention over a paged cache, and the write to that cache, on torch tensors.

In: CPU tensors and an `AttentionBatch`. Out: activations with the meaning that the reference gives. A token's bits
depend neither on its neighbours, nor on how its prompt was cut into chunks, nor on the number of threads.
Must never know: plans of precisions, requests, layers.

With a query and a cache in bfloat16, products are of bfloat16 pairs summed in float32, and the softmax's weights are
rounded to bfloat16 before they multiply the values; their total is that of the rounded weights. Codes are exact in
bfloat16 and multiplied likewise: the scale of a key multiplies its score, and that of a value the weight before it is
rounded. Otherwise everything is float32.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Unpack
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.step import AttentionBatch, AttentionOptions, CachedAttention, LayerCache

if TYPE_CHECKING:
    from amalgam import _native

# The plan of a batch, made by the first layer that attends outside a compiled program.
_PLANS: WeakKeyDictionary[AttentionBatch, _native.AttentionPlan] = WeakKeyDictionary()


def supports_paged_attention(query: Tensor, cache: LayerCache, batch: AttentionBatch) -> bool:
    """Whether `paged_attention` takes these tensors; depends on types and devices only."""
    return (
        extension.is_available()
        and query.dtype in extension.FLOAT_TYPES
        and cache.keys.dtype in extension.CACHE_TYPES
        and cache.values.dtype is cache.keys.dtype
        and query.is_cpu
        and cache.keys.is_cpu
        and batch.block_tables.is_cpu
    )


def paged_attention(query: Tensor, cache: LayerCache, batch: AttentionBatch, **how: Unpack[AttentionOptions]) -> Tensor:
    """Causal attention over a paged cache; see `operators.paged_attention`.

    query: `[tokens, heads, d]`, float32 or bfloat16. Returns `[tokens, heads, v]` in query's type.

    Raises:
        ValueError: shapes, types or block tables that do not fit together.
    """
    out = torch.empty((*query.shape[:2], cache.values.shape[-1]), dtype=query.dtype)
    sinks = how.get("sinks")
    table(extension.isa()).attend(
        plan_of(batch),
        _dense_rows(query),
        (_dense_rows(cache.keys), cache.key_scales),
        (_dense_rows(cache.values), cache.value_scales),
        out,
        how["scale"],
        how.get("window"),
        None if sinks is None else sinks.to("cpu", torch.float32).contiguous(),
        how.get("softcap"),
        how.get("chunk"),
        torch.get_num_threads(),
    )
    return out


def index_scores(query: Tensor, weights: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
    """An indexer's scores; see `operators.index_scores`. For the tensors that `supports_paged_attention` tells.

    query: `[tokens, heads, d]`, float32 or bfloat16. weights: float32 `[tokens, heads]`.

    Raises:
        ValueError: shapes, types or block tables that do not fit together.
    """
    from amalgam import _native

    tile = _native.score_tile
    out = torch.empty((len(query), -(-int(batch.context_lengths.max()) // tile) * tile))
    table(extension.isa()).score_keys(
        plan_of(batch),
        _dense_rows(query),
        (_dense_rows(cache.keys), cache.key_scales),
        weights.contiguous(),
        out,
        torch.get_num_threads(),
    )
    return out


def supports_cached_attention(query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> bool:
    """Whether `cached_attention` takes these tensors; depends on types, devices and the cache's layout only."""
    return (
        query.dtype is key.dtype is value.dtype
        and supports_paged_attention(query, how.cache, how.batch)
        and key.is_cpu
        and value.is_cpu
        and how.cache.keys.is_contiguous()
        and how.cache.values.is_contiguous()
    )


def cached_attention(query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> Tensor:
    """See `Operators.cached_attention`, which all of this is in one call.

    Raises:
        ValueError: shapes or types that do not fit together.
        IndexError: a slot that the cache does not have; nothing is written.
    """
    cache = how.cache
    heads = query.shape[-1] // max(1, cache.keys.shape[-1])
    out = torch.empty((query.shape[0], heads * cache.values.shape[-1]), dtype=query.dtype)
    table(extension.isa()).attend_cached(
        extension.kernels(),
        plan_of(how.batch),
        (_dense_rows(query), _dense_rows(key), _dense_rows(value)),
        (cache.keys, cache.key_scales),
        (cache.values, cache.value_scales),
        how.slot_ids.contiguous(),
        _pair(how.norms),
        how.norm_eps,
        how.rounds_last,
        _pair(how.rotary),
        how.is_interleaved,
        how.norms_last,
        out,
        how.scale,
        how.window,
        None if how.sinks is None else how.sinks.to("cpu", torch.float32).contiguous(),
        how.softcap,
        how.chunk,
        torch.get_num_threads(),
    )
    return out


def _pair(tensors: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if tensors is None else (tensors[0].contiguous(), tensors[1].contiguous())


def supports_write_kv(cache: LayerCache, key: Tensor, value: Tensor, slot_ids: Tensor) -> bool:
    """Whether `write_kv` takes these tensors; depends on types, devices and the cache's layout only."""
    return (
        extension.is_available()
        and key.dtype in extension.NAMES
        and value.dtype in extension.NAMES
        and cache.keys.dtype in extension.CACHE_TYPES
        and cache.values.dtype is cache.keys.dtype
        and slot_ids.dtype is torch.int64
        and cache.keys.is_cpu
        and key.is_cpu
        and value.is_cpu
        and slot_ids.is_cpu
        and cache.keys.is_contiguous()
        and cache.values.is_contiguous()
    )


def write_kv(cache: LayerCache, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
    """`cache[slot_ids[t]] = new[t]` in the cache's type, whose tensors are contiguous; see `operators.write_kv`.

    Raises:
        ValueError: shapes or types that do not fit together.
        IndexError: a slot that the cache does not have; nothing is written.
    """
    from amalgam import _native

    _native.write_kv(
        (cache.keys, cache.key_scales),
        (cache.values, cache.value_scales),
        key.contiguous(),
        value.contiguous(),
        slot_ids.contiguous(),
        torch.get_num_threads(),
    )


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def plan_of(batch: AttentionBatch) -> _native.AttentionPlan:
    """The batch's sequences as the kernels read them."""
    plan = _PLANS.get(batch)
    if plan is None:
        plan = _PLANS[batch] = _make_plan(batch)
    return plan


def _make_plan(batch: AttentionBatch) -> _native.AttentionPlan:
    from amalgam import _native

    return _native.AttentionPlan(
        batch.query_starts.contiguous(),
        batch.context_lengths.contiguous(),
        _dense_rows(batch.block_tables),
        batch.block_size,
    )


@functools.cache
def table(isa: str) -> _native.AttentionKernels:
    from amalgam import _native

    return _native.attention_kernels(isa)
