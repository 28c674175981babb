"""Attention over a paged cache: one kernel for tokens of streams, whose context is split, and for tiles of a prompt.

In: queries, the cache, a batch. Out: activations with the meaning of `reference.operators.paged_attention`. Must never
know: requests, layers, plans of precisions.

A tile is up to `BLOCK_Q` queries that follow each other in one sequence; the heads that share a key stand together:

    lane of a tile   query 0: head 0, 1, …, BLOCK_H - 1  |  query 1: head 0, …  |  …

A sequence with few new tokens (`batches.MOST_SINGLE`) becomes tiles of one query, whose keys are divided among
programs. Each leaves its softmax's maximum, total and sum of values, and `combine` makes one of them. How keys are
divided depends on the token's position and the layer's shape, so that a token's bits do not depend on what else is in
the step. Longer ones become tiles of many queries, and each program goes through all keys. Everything that changes from
step to step is read from tensors on the device, so that a launch can be captured.

With queries and a cache of one 16-bit type products are of that type, summed in float32, and the softmax's weights are
rounded to it before they multiply the values; their total is that of the rounded weights. Codes are exact in 16 bits:
the scale of a key multiplies its score, that of a value the weight before it is rounded. Otherwise all is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from amalgam.kernels.backends.triton.attention_kernels import attend, combine
from amalgam.kernels.backends.triton.batches import tiles_of
from amalgam.kernels.backends.triton.launching import FLOAT_TYPES, on_device_of, power_of_two, runs_on
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.variants import Variant
from amalgam.kernels.step import AttentionBatch, AttentionOptions, LayerCache

CODE_TYPES = (torch.int8, torch.float8_e4m3fn)
_WIDEST_VALUE = 512  # of a head: what a program keeps in registers
_NO_LIMIT = 2**31 - 1
_PROGRAMS = 128  # about as many as a card has processors: one sequence alone should keep all of them busy
_STAGES = 2  # tiles of keys that are on their way
_LEAST_KEYS = 128  # of a split; fewer, and its partial result would weigh as much as the keys


def supports(query: Tensor, cache: LayerCache, batch: AttentionBatch) -> bool:
    """Whether `paged_attention` takes these tensors; depends on types, devices and the heads' shape only."""
    return (
        runs_on(query, cache.keys, cache.values, batch.block_tables)
        and query.dtype in FLOAT_TYPES
        and cache.keys.dtype is cache.values.dtype
        and cache.keys.dtype in (*FLOAT_TYPES, *CODE_TYPES)
        and cache.keys.stride(-1) == cache.values.stride(-1) == 1
        and takes(query.shape[2], cache.values.shape[2])
    )


def takes(dim: int, value_dim: int) -> bool:
    """Whether `paged_attention` takes heads of queries and keys, and of values, of these widths."""
    return 0 < value_dim <= _WIDEST_VALUE and dim <= 2 * _WIDEST_VALUE


@dataclass(frozen=True)
class Shape:
    """How a layer's attention is laid out: the constants of a launch.

    Attributes:
        first, rest: parts of a head, powers of two, so that 576 dimensions do not become 1024.
        splits: programs that share the keys of one tile.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    block_q: int
    block_h: int
    block_n: int
    first: int
    rest: int
    splits: int
    warps: int

    @property
    def shared(self) -> int:
        return self.heads // self.kv_heads

    @property
    def head_blocks(self) -> int:
        return -(-self.shared // self.block_h)

    @classmethod
    def of(cls, heads: int, kv_heads: int, dim: int, value_dim: int, itemsize: int, *, is_single: bool) -> Shape:
        """The shape for tiles of one query, or of many; by the layer alone, never by the number of rows.

        itemsize: of what is multiplied, in bytes.
        """
        shared = heads // kv_heads
        first = max(16, power_of_two(dim + 1) // 2)
        rest = 0 if dim <= first else max(16, power_of_two(dim - first))
        is_wide = max(first, value_dim) > 128 or itemsize > 2
        lanes = 16 if is_single else 32 if is_wide else 128 if first <= 64 else 64
        block_h = min(power_of_two(shared), 16 if is_single or is_wide else 64)
        block_q = 1 if is_single else max(1, lanes // block_h)
        if is_single:
            block_h = max(block_h, 16)  # the least that tensor cores multiply
        programs = kv_heads * -(-shared // block_h)
        splits = min(32, power_of_two(-(-_PROGRAMS // programs))) if is_single else 1
        block_n = 32 if is_wide else 64
        warps = 8 if value_dim > 256 or lanes >= 128 else 4
        return cls(heads, kv_heads, dim, value_dim, block_q, block_h, block_n, first, rest, splits, warps)


def paged_attention(query: Tensor, cache: LayerCache, batch: AttentionBatch, **how: Unpack[AttentionOptions]) -> Tensor:
    """See `reference.operators.paged_attention`; only for what `supports` takes."""
    (tokens, heads, dim), kv_heads, value_dim = query.shape, cache.keys.shape[1], cache.values.shape[2]
    out = query.new_empty(tokens, heads, value_dim)
    query = query if query.stride()[1:] == (dim, 1) else query.contiguous()
    found = tiles_of(batch)
    kind = multiplied_type(query.dtype, cache.keys.dtype)
    for is_single in (True, False):
        shape = Shape.of(heads, kv_heads, dim, value_dim, kind.itemsize, is_single=is_single)
        for tiles in found.single if is_single else found.prompts(shape.block_q):
            with on_device_of(query):
                _launch(query, cache, batch, tiles, out, shape, how)
    return out


def _launch(
    query: Tensor,
    cache: LayerCache,
    batch: AttentionBatch,
    tiles: Tensor,
    out: Tensor,
    shape: Shape,
    how: AttentionOptions,
) -> None:
    window, sinks, softcap, chunk = how.get("window"), how.get("sinks"), how.get("softcap"), how.get("chunk")
    num_tiles = tiles.shape[1]
    is_split = shape.splits > 1
    # As many as the longest row of the table can need: the others would find no keys.
    num_splits = min(shape.splits, -(-batch.block_tables.shape[1] * batch.block_size // _LEAST_KEYS))
    partial = query.new_empty(
        (num_tiles, num_splits, shape.heads, shape.value_dim) if is_split else 0, dtype=torch.float32
    )
    peaks = query.new_empty((2, num_tiles, num_splits, shape.heads) if is_split else 0, dtype=torch.float32)
    limits = (_NO_LIMIT if window is None else window, _NO_LIMIT if chunk is None else chunk)
    sinks = sinks if sinks is None else sinks.float()
    attend[(num_tiles, shape.kv_heads * shape.head_blocks, num_splits if is_split else 1)](
        query,
        _bytes(cache.keys),
        _bytes(cache.values),
        cache.key_scales,
        cache.value_scales,
        sinks,
        tiles,
        batch.block_tables,
        out,
        partial,
        peaks,
        num_tiles,
        batch.block_tables.stride(0),
        query.stride(0),
        *cache.keys.stride()[:2],
        *cache.values.stride()[:2],
        how["scale"],
        1.0 if softcap is None else softcap,
        *limits,
        **constants_of(
            shape,
            batch.block_size,
            codes_of(cache.keys.dtype),
            multiplied_type(query.dtype, cache.keys.dtype) is torch.float32,
            _shares_keys(cache),
            softcap is not None,
            sinks is not None,
        ),
        num_warps=shape.warps,
        num_stages=_STAGES,
        **OPTIONS,
    )
    if is_split:
        combine[(num_tiles, shape.heads)](
            partial,
            peaks,
            sinks,
            tiles,
            out,
            num_tiles,
            num_splits,
            *limits,
            **combining_constants_of(shape, sinks is not None),
            num_warps=_combining_warps(shape),
            **OPTIONS,
        )


def constants_of(
    shape: Shape, block_size: int, codes: int, is_wide: bool, shares_keys: bool, has_cap: bool, has_sinks: bool
) -> dict[str, Any]:
    """What `attend` is compiled for."""
    return {
        "HEADS": shape.heads,
        "SHARED": shape.shared,
        "HEAD_BLOCKS": shape.head_blocks,
        "DIM": shape.dim,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_Q": shape.block_q,
        "BLOCK_H": shape.block_h,
        "BLOCK_N": shape.block_n,
        "FIRST": shape.first,
        "REST": shape.rest,
        "BLOCK_V": max(16, power_of_two(shape.value_dim)),
        "BLOCK_SIZE": block_size,
        "SPLITS": shape.splits,
        "LEAST": _LEAST_KEYS,
        "CODES": codes,
        "IS_WIDE": is_wide,
        "SHARES_KEYS": shares_keys and shape.value_dim == shape.first,
        "HAS_CAP": has_cap,
        "HAS_SINKS": has_sinks,
    }


def combining_constants_of(shape: Shape, has_sinks: bool) -> dict[str, Any]:
    """What `combine` is compiled for."""
    return {
        "HEADS": shape.heads,
        "VALUE_DIM": shape.value_dim,
        "BLOCK_V": power_of_two(shape.value_dim),
        "BLOCK_N": shape.block_n,
        "SPLITS": shape.splits,
        "LEAST": _LEAST_KEYS,
        "HAS_SINKS": has_sinks,
    }


def _combining_warps(shape: Shape) -> int:
    return 8 if shape.value_dim > 128 else 4


def codes_of(dtype: torch.dtype) -> int:
    """0: values as they are; 1: int8; 2: float8_e4m3fn, as bytes."""
    return (torch.int8, torch.float8_e4m3fn).index(dtype) + 1 if dtype in CODE_TYPES else 0


def multiplied_type(query: torch.dtype, cache: torch.dtype) -> torch.dtype:
    """What scores are products of."""
    return query if cache is query or cache in CODE_TYPES else torch.float32


def _shares_keys(cache: LayerCache) -> bool:
    """Whether the values are the first columns of the keys, as latent vectors are."""
    keys, values = cache.keys, cache.values
    return keys.data_ptr() == values.data_ptr() and keys.stride() == values.stride()


def _bytes(cache: Tensor) -> Tensor:
    """Cards before sm_89 have no type of 8 bits with an exponent."""
    return cache.view(torch.uint8) if cache.dtype is torch.float8_e4m3fn else cache


@dataclass(frozen=True)
class _Published:
    """A published model's attention, for `VARIANTS`."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    has_sinks: bool = False
    shares_keys: bool = False


def _variants() -> Iterator[Variant]:
    models = (
        _Published("qwen3", 32, 4, 128, 128),
        _Published("gpt_oss", 64, 8, 64, 64, has_sinks=True),
        _Published("deepseek_v3", 128, 1, 576, 512, shares_keys=True),
    )
    integers = ("num_tiles", "table_stride", "query_stride", "key_stride", "key_head_stride", "value_stride")
    common = dict.fromkeys((*integers, "value_head_stride", "window", "chunk"), "i32")
    for model in models:
        for cache_type, codes in (("bf16", 0), ("i8", 1), ("u8", 2)):
            for is_single in (True, False):
                shape = Shape.of(model.heads, model.kv_heads, model.dim, model.value_dim, 2, is_single=is_single)
                types = {"query": "*bf16", "keys": f"*{cache_type}", "values": f"*{cache_type}", "out": "*bf16"}
                types |= {"tiles": "*i64", "tables": "*i64", "partial": "*fp32", "peaks": "*fp32"}
                types |= {"scale": "fp32", "cap": "fp32", **common}
                types |= {"key_scales": "*fp32", "value_scales": "*fp32"} if codes else {}
                types |= {"sinks": "*fp32"} if model.has_sinks else {}
                constants = constants_of(shape, 16, codes, False, model.shares_keys, False, model.has_sinks)
                missing = {name: None for name in ("key_scales", "value_scales", "sinks") if name not in types}
                kind = "tokens" if is_single else "prompts"
                name = f"attend/{model.name}/{cache_type}/{kind}"
                yield Variant(name, attend, types, {**constants, **missing}, shape.warps, _STAGES)
        shape = Shape.of(model.heads, model.kv_heads, model.dim, model.value_dim, 2, is_single=True)
        types = {"partial": "*fp32", "peaks": "*fp32", "tiles": "*i64", "out": "*bf16"}
        types |= dict.fromkeys(("num_tiles", "num_splits", "window", "chunk"), "i32")
        types |= {"sinks": "*fp32"} if model.has_sinks else {}
        constants = combining_constants_of(shape, model.has_sinks) | ({} if model.has_sinks else {"sinks": None})
        yield Variant(f"combine/{model.name}", combine, types, constants, _combining_warps(shape))


VARIANTS = tuple(_variants())
