"""Heads on their way into attention: queries and keys normed and rotated, keys and values cached, in one launch.

In: projections. Out: queries; the cache is written. Must never know: requests, layers, plans of precisions.

A program has some heads of one token, each as three pieces: the first and the second partners of the rotary pairs, and
what does not turn. Codes are those of `reference.operators.to_codes`, bit for bit where the values are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.backends.triton.attention import CODE_TYPES, codes_of
from amalgam.kernels.backends.triton.launching import (
    FLOAT_TYPES,
    nearest_even,
    on_device_of,
    power_of_two,
    rounded,
    runs_on,
)
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.variants import Variant
from amalgam.kernels.step import CachedAttention, LayerCache

_WIDEST = 4096  # of a head: a program keeps it in registers
_MOST_HEADS = 8  # of a program
_WARPS = 2


def supports(cache: LayerCache, rows: Tensor, slot_ids: Tensor) -> bool:
    """Whether `write` takes these tensors; depends on types and devices only."""
    return (
        runs_on(rows, cache.keys, cache.values, slot_ids)
        and rows.dtype in FLOAT_TYPES
        and cache.keys.dtype is cache.values.dtype
        and cache.keys.dtype in (*FLOAT_TYPES, *CODE_TYPES)
        and max(cache.keys.shape[2], cache.values.shape[2]) <= _WIDEST
        and cache.keys.stride(-1) == cache.values.stride(-1) == 1
    )


def write(cache: LayerCache, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
    """See `reference.operators.write_kv`; a token whose slot is negative is not written."""
    rows = key.flatten(1), value.flatten(1)
    _launch(None, *rows, cache, slot_ids, None)


def place(query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> Tensor:
    """Norm and rotate the heads as `how` says, write keys and values; returns the queries, `[tokens, heads, d]`.

    query, key, value: `[tokens, heads × d]`, `[tokens, kv_heads × d]`, `[tokens, kv_heads × v]`, of one type. A token
    whose slot is negative is not written.
    """
    queries = query.new_empty(query.shape[0], query.shape[1] // how.cache.keys.shape[2], how.cache.keys.shape[2])
    _launch(query, key, value, how.cache, how.slot_ids, how, queries)
    return queries


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.operators.rotate`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tokens, heads, dim = x.shape
    if not out.numel():
        return out
    half = cos.shape[1]
    with on_device_of(x):
        block = min(_MOST_HEADS, power_of_two(heads))
        rotate_heads[(tokens, triton.cdiv(heads, block))](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            *x.stride(),
            HEADS=heads,
            BLOCK_HEADS=block,
            DIM=dim,
            HALF=half,
            BLOCK_HALF=power_of_two(half),
            BLOCK_REST=power_of_two(dim - 2 * half),
            num_warps=_WARPS,
            **OPTIONS,
        )
    return out


def supports_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these tensors."""
    return (
        runs_on(x, cos, sin)
        and x.dtype in FLOAT_TYPES
        and cos.dtype == sin.dtype == torch.float32
        and x.dim() == 3
        and x.shape[2] <= _WIDEST
        and 2 * cos.shape[1] <= x.shape[2]
    )


def _launch(
    query: Tensor | None,
    key: Tensor,
    value: Tensor,
    cache: LayerCache,
    slot_ids: Tensor,
    how: CachedAttention | None,
    queries: Tensor | None = None,
) -> None:
    tokens, (kv_heads, dim), value_dim = key.shape[0], cache.keys.shape[1:], cache.values.shape[2]
    heads = 0 if query is None else query.shape[1] // dim
    value_heads = cache.values.shape[1] if value_dim else 0
    if not tokens:
        return
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    query = query if query is None or query.stride(-1) == 1 else query.contiguous()
    norms = None if how is None else how.norms
    cos, sin = (None, None) if how is None or how.rotary is None else (x.contiguous() for x in how.rotary)
    half = 0 if cos is None else cos.shape[1]
    block = _block(heads, kv_heads)
    is_code = codes_of(cache.keys.dtype) == 2
    with on_device_of(key):
        place_heads[(tokens, sum(triton.cdiv(count, block) for count in (heads, kv_heads, value_heads)))](
            query,
            key,
            value,
            queries,
            cache.keys.view(torch.uint8) if is_code else cache.keys,
            cache.values.view(torch.uint8) if is_code else cache.values,
            cache.key_scales,
            cache.value_scales,
            slot_ids,
            cos,
            sin,
            *((None, None) if norms is None else norms),
            0 if query is None else query.stride(0),
            key.stride(0),
            value.stride(0),
            *cache.keys.stride()[:2],
            *cache.values.stride()[:2],
            0.0 if how is None else how.norm_eps,
            **_constants(heads, kv_heads, dim, value_dim, half, codes_of(cache.keys.dtype)),
            HAS_NORMS=norms is not None,
            ROUNDS_LAST=how is not None and how.rounds_last,
            NORMS_LAST=how is not None and how.norms_last,
            IS_INTERLEAVED=how is not None and how.is_interleaved,
            num_warps=_WARPS,
            **OPTIONS,
        )


def _block(heads: int, kv_heads: int) -> int:
    return min(_MOST_HEADS, power_of_two(max(heads, kv_heads)))


def _constants(heads: int, kv_heads: int, dim: int, value_dim: int, half: int, codes: int) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "BLOCK_HEADS": _block(heads, kv_heads),
        "DIM": dim,
        "VALUE_DIM": value_dim,
        "HALF": half,
        "BLOCK_HALF": power_of_two(half),
        "BLOCK_REST": power_of_two(dim - 2 * half),
        "BLOCK_V": power_of_two(value_dim),
        "CODES": codes,
    }


@triton.jit
def code_of(value, scale, CODES: tl.constexpr):
    """The nearest code of a value; scale: 0 where all values of the row are 0."""
    largest = 127.0 if CODES == 1 else 448.0
    x = tl.div_rn(value, tl.where(scale > 0.0, scale, 1.0) + tl.zeros_like(value))
    x = tl.minimum(tl.maximum(x, -largest), largest)
    if CODES == 1:
        code = nearest_even(x).to(tl.int8)
    else:
        # float8_e4m3fn of float32, to nearest even: three bits of the mantissa, or from 2^-6 down multiples of 2^-9.
        bits = x.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        small = nearest_even(tl.abs(x) * 512.0).to(tl.int32)
        either = tl.where(magnitude < (127 - 6) << 23, small, normal)
        code = (either | ((bits >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def scale_of(largest, bad, CODES: tl.constexpr):
    """The scale of a row by its largest magnitude: NaN where a value is not finite."""
    scale = tl.div_rn(largest, 127.0 if CODES == 1 else 448.0)
    return tl.where(bad > 0, float("nan"), scale)


@triton.jit
def largest_of(x):
    """Of each head, the largest magnitude."""
    return tl.max(tl.abs(x), 1)


@triton.jit
def bad_of(x):
    """Of each head, 1 if a value is not finite."""
    return tl.max(((x != x) | (tl.abs(x) == float("inf"))).to(tl.int32), 1)


@triton.jit
def stored(x, scale, bad, kind, CODES: tl.constexpr):
    """What the cache keeps of values."""
    if CODES > 0:
        result = code_of(tl.where(bad[:, None] > 0, 0.0, x), tl.where(bad > 0, 1.0, scale)[:, None], CODES)
    else:
        result = rounded(x, kind)
    return result


@triton.jit
def turned(first, second, cos, sin, kind):
    """Rotary pairs turned, each rounded to a type and wide again."""
    one = rounded(first * cos - second * sin, kind).to(tl.float32)
    return one, rounded(second * cos + first * sin, kind).to(tl.float32)


@triton.jit
def weighted(x, weight, factor, kind, ROUNDS_LAST: tl.constexpr):
    """x × factor × weight of an RMSNorm, rounded as it says, and wide again."""
    if ROUNDS_LAST:
        return rounded(x * factor * weight, kind).to(tl.float32)
    weight = rounded(weight, kind).to(tl.float32)
    return rounded(rounded(x * factor, kind).to(tl.float32) * weight, kind).to(tl.float32)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def place_heads(
    query,
    key,
    value,
    queries,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    slots,
    cos,
    sin,
    query_norm,
    key_norm,
    query_stride,
    key_stride,
    value_stride,
    key_slot_stride,
    key_head_stride,
    value_slot_stride,
    value_head_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CODES: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ROUNDS_LAST: tl.constexpr,
    NORMS_LAST: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
):
    """Some heads of one token: queries first, then keys, then values."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    kind = key.dtype.element_ty
    QUERIES: tl.constexpr = tl.cdiv(HEADS, BLOCK_HEADS)
    KEYS: tl.constexpr = tl.cdiv(KV_HEADS, BLOCK_HEADS)
    lane = tl.arange(0, BLOCK_HEADS)
    if block >= QUERIES + KEYS:
        if slot >= 0:
            head = (block - QUERIES - KEYS) * BLOCK_HEADS + lane
            column = tl.arange(0, BLOCK_V)[None, :]
            is_there = (head < KV_HEADS)[:, None] & (column < VALUE_DIM)
            at_source = value + token * value_stride + head[:, None] * VALUE_DIM + column
            x = tl.load(at_source, is_there, 0.0).to(tl.float32)
            bad, scale = bad_of(x), largest_of(x)
            if CODES > 0:
                scale = scale_of(scale, bad, CODES)
                tl.store(value_scales + slot * KV_HEADS + head, scale, head < KV_HEADS)
            at = value_cache + slot * value_slot_stride + head[:, None] * value_head_stride + column
            tl.store(at, stored(x, scale, bad, value_cache.dtype.element_ty, CODES), is_there)
        return

    is_query = block < QUERIES
    head = tl.where(is_query, block, block - QUERIES) * BLOCK_HEADS + lane
    is_head = (head < tl.where(is_query, HEADS, KV_HEADS))[:, None]
    pair, other = tl.arange(0, BLOCK_HALF)[None, :], 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    is_pair, is_other = is_head & (pair < HALF), is_head & (other < DIM)
    at_first = 2 * pair if IS_INTERLEAVED else pair
    at_second = 2 * pair + 1 if IS_INTERLEAVED else HALF + pair
    source = key + token * key_stride
    if HEADS > 0:
        if is_query:
            source = query + token * query_stride
    source += head[:, None] * DIM
    first = tl.load(source + at_first, is_pair, 0.0).to(tl.float32)
    second = tl.load(source + at_second, is_pair, 0.0).to(tl.float32)
    rest = tl.load(source + other, is_other, 0.0).to(tl.float32)
    if HALF > 0:
        cosine = tl.load(cos + token * HALF + pair, pair < HALF, 0.0)
        sine = tl.load(sin + token * HALF + pair, pair < HALF, 0.0)
        if NORMS_LAST:
            first, second = turned(first, second, cosine, sine, kind)
    if HAS_NORMS:
        norm = key_norm
        if is_query:
            norm = query_norm
        sum_of_all = tl.sum(first * first, 1) + tl.sum(second * second, 1) + tl.sum(rest * rest, 1)
        factor = tl.rsqrt(sum_of_all / DIM + eps)[:, None]
        at_one = pair if NORMS_LAST else at_first
        at_two = HALF + pair if NORMS_LAST else at_second
        first = weighted(first, tl.load(norm + at_one, pair < HALF, 0.0).to(tl.float32), factor, kind, ROUNDS_LAST)
        second = weighted(second, tl.load(norm + at_two, pair < HALF, 0.0).to(tl.float32), factor, kind, ROUNDS_LAST)
        rest = weighted(rest, tl.load(norm + other, other < DIM, 0.0).to(tl.float32), factor, kind, ROUNDS_LAST)
    if HALF > 0 and not NORMS_LAST:
        first, second = turned(first, second, cosine, sine, kind)

    if HEADS > 0:
        if is_query:
            out = queries + (token * HEADS + head[:, None]) * DIM
            tl.store(out + pair, rounded(first, kind), is_pair)
            tl.store(out + HALF + pair, rounded(second, kind), is_pair)
            tl.store(out + other, rounded(rest, kind), is_other)
            return
    if slot >= 0:
        bad = tl.maximum(tl.maximum(bad_of(first), bad_of(second)), bad_of(rest))
        scale = tl.maximum(tl.maximum(largest_of(first), largest_of(second)), largest_of(rest))
        if CODES > 0:
            scale = scale_of(scale, bad, CODES)
            tl.store(key_scales + slot * KV_HEADS + head, scale, head < KV_HEADS)
        cache = key_cache + slot * key_slot_stride + head[:, None] * key_head_stride
        of_cache = key_cache.dtype.element_ty
        tl.store(cache + pair, stored(first, scale, bad, of_cache, CODES), is_pair)
        tl.store(cache + HALF + pair, stored(second, scale, bad, of_cache, CODES), is_pair)
        tl.store(cache + other, stored(rest, scale, bad, of_cache, CODES), is_other)


@triton.jit
def rotate_heads(
    x,
    cos,
    sin,
    out,
    token_stride,
    head_stride,
    stride,
    HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Some heads of one token; halves are paired."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)[:, None]
    pair, other = tl.arange(0, BLOCK_HALF)[None, :], 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    is_pair, is_other = (head < HEADS) & (pair < HALF), (head < HEADS) & (other < DIM)
    source = x + token * token_stride + head * head_stride
    kind = out.dtype.element_ty
    first = tl.load(source + pair * stride, is_pair, 0.0).to(tl.float32)
    second = tl.load(source + (HALF + pair) * stride, is_pair, 0.0).to(tl.float32)
    cosine = tl.load(cos + token * HALF + pair, pair < HALF, 0.0)
    sine = tl.load(sin + token * HALF + pair, pair < HALF, 0.0)
    first, second = turned(first, second, cosine, sine, kind)
    at = out + (token * HEADS + head) * DIM
    tl.store(at + pair, rounded(first, kind), is_pair)
    tl.store(at + HALF + pair, rounded(second, kind), is_pair)
    tl.store(at + other, tl.load(source + other * stride, is_other, 0.0), is_other)


def _variants() -> Iterator[Variant]:
    """Of Qwen3-30B-A3B, and a latent vector of DeepSeek-V3."""
    strides = ("query_stride", "key_stride", "value_stride", "key_slot_stride", "key_head_stride")
    integers = dict.fromkeys((*strides, "value_slot_stride", "value_head_stride"), "i32")
    for cache_type, codes in (("bf16", 0), ("i8", 1), ("u8", 2)):
        scales = dict.fromkeys(("key_scales", "value_scales"), "*fp32") if codes else {}
        types = {"slots": "*i64", "key": "*bf16", "value": "*bf16", "eps": "fp32", **integers, **scales}
        types |= {"key_cache": f"*{cache_type}", "value_cache": f"*{cache_type}"}
        more = dict.fromkeys(("query", "queries", "query_norm", "key_norm"), "*bf16")
        for name, found, heads, shape, half in (
            ("place/qwen3", types | more | {"cos": "*fp32", "sin": "*fp32"}, 32, (4, 128, 128), 64),
            ("place/deepseek_v3", types, 0, (1, 576, 0), 0),
        ):
            missing = {name: None for name in place_heads.arg_names if name.islower() and name not in found}
            constants = _constants(heads, *shape, half, codes)
            constants |= {"HAS_NORMS": bool(heads), "ROUNDS_LAST": False, "NORMS_LAST": False, "IS_INTERLEAVED": False}
            yield Variant(f"{name}/{cache_type}", place_heads, found, {**constants, **missing}, _WARPS)


VARIANTS = tuple(_variants())
