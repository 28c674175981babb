"""The kernels of `attention`, which says what a tile is and who divides its keys.

In: what a launch points to. Out: activations. Must never know: requests, layers, plans of precisions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.kernels.backends.triton.launching import LOG2_E, product, rounded


@triton.jit
def expanded(codes, CODES: tl.constexpr, to):
    """Codes in a floating type; those of float8_e4m3fn come divided by 256, see `code_unit`.

    A byte s.eeee.mmm becomes the float16 s.0eeee.mmm0000000, whose exponent's bias is 8 larger; there is no NaN among
    codes, their scale would be it.
    """
    if CODES == 2:
        wide = codes.to(tl.uint16)
        result = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True).to(to)
    elif CODES == 1:
        result = rounded(codes.to(tl.float32), to)
    else:
        result = codes.to(to)
    return result


@triton.jit
def code_unit(CODES: tl.constexpr):
    """What `expanded` has left out of the scale."""
    return 256.0 if CODES == 2 else 1.0


@triton.jit
def span(position, count, window, chunk, split, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, LEAST: tl.constexpr):
    """Keys [start, end) of a tile's split, and into how many parts its keys are divided."""
    end = position + count
    start = tl.maximum(tl.maximum(position - window + 1, 0), position // chunk * chunk)
    start = start // BLOCK_N * BLOCK_N
    parts = 1
    if SPLITS > 1:
        length = tl.maximum(tl.cdiv(tl.cdiv(end - start, SPLITS), BLOCK_N) * BLOCK_N, LEAST)
        parts = tl.cdiv(end - start, length)
        start += split * length
        end = tl.minimum(start + length, end)
    return start, end, parts


# Where a step's tensors begin, and how many rows it has, compiles nothing anew: else any step might have to wait.
@triton.jit(
    do_not_specialize=["num_tiles", "table_stride", "window", "chunk"],
    do_not_specialize_on_alignment=["tiles", "tables"],
)
def attend(
    query,
    keys,
    values,
    key_scales,
    value_scales,
    sinks,
    tiles,
    tables,
    out,
    partial,
    peaks,
    num_tiles,
    table_stride,
    query_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    scale,
    cap,
    window,
    chunk,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    HEAD_BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    CODES: tl.constexpr,
    IS_WIDE: tl.constexpr,
    SHARES_KEYS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One tile, one block of the heads that share a key, one split of its keys; the softmax is in powers of two."""
    tile, split = tl.program_id(0), tl.program_id(2)
    kv_head, head_block = tl.program_id(1) // HEAD_BLOCKS, tl.program_id(1) % HEAD_BLOCKS
    first_row = tl.load(tiles + tile)
    position = tl.load(tiles + num_tiles + tile).to(tl.int32)
    count = tl.load(tiles + 2 * num_tiles + tile).to(tl.int32)
    table = tables + tl.load(tiles + 3 * num_tiles + tile) * table_stride
    start, end, parts = span(position, count, window, chunk, split, BLOCK_N, SPLITS, LEAST)
    if split >= parts:
        return

    lane = tl.arange(0, BLOCK_Q * BLOCK_H)
    shared = head_block * BLOCK_H + lane % BLOCK_H
    head = kv_head * SHARED + shared
    is_real = (lane // BLOCK_H < count) & (shared < SHARED)
    row = first_row + lane // BLOCK_H
    own = position + lane // BLOCK_H
    least = tl.maximum(own - window + 1, own // chunk * chunk)
    kind = tl.float32 if IS_WIDE else query.dtype.element_ty

    columns = tl.arange(0, FIRST)
    at_query = query + row[:, None] * query_stride + head[:, None] * DIM
    x = tl.load(at_query + columns[None, :], is_real[:, None] & (columns < DIM)[None, :], 0.0).to(kind)
    if REST > 0:
        others = FIRST + tl.arange(0, REST)
        y = tl.load(at_query + others[None, :], is_real[:, None] & (others < DIM)[None, :], 0.0).to(kind)
    of_value = tl.arange(0, BLOCK_V)

    peak = tl.full((BLOCK_Q * BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q * BLOCK_H,), tl.float32)
    result = tl.zeros((BLOCK_Q * BLOCK_H, BLOCK_V), tl.float32)
    for first_key in range(start, end, BLOCK_N):
        place = first_key + tl.arange(0, BLOCK_N)
        # What lies behind is another's: a weight of zero would still spread its NaN.
        exists = place < end
        slot = tl.load(table + place // BLOCK_SIZE, exists, 0).to(tl.int64) * BLOCK_SIZE + place % BLOCK_SIZE
        at_key = keys + slot[:, None] * key_stride + kv_head * key_head_stride
        key = expanded(tl.load(at_key + columns[None, :], exists[:, None] & (columns < DIM)[None, :], 0), CODES, kind)
        scores = product(x, tl.trans(key), tl.zeros((BLOCK_Q * BLOCK_H, BLOCK_N), tl.float32))
        if REST > 0:
            more = tl.load(at_key + others[None, :], exists[:, None] & (others < DIM)[None, :], 0)
            scores = product(y, tl.trans(expanded(more, CODES, kind)), scores)
        if CODES > 0:
            unit = tl.load(key_scales + slot * (HEADS // SHARED) + kv_head, exists, 0.0) * code_unit(CODES)
            scores *= unit[None, :]
        scores *= scale
        if HAS_CAP:
            scores = cap - 2.0 * cap / (1.0 + tl.exp(scores * (2.0 / cap)))
        is_visible = exists[None, :] & (place[None, :] <= own[:, None]) & (place[None, :] >= least[:, None])
        scores = tl.where(is_visible, scores * LOG2_E, float("-inf"))

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # a lane that has seen nothing yet
        weights = tl.exp2(scores - safe[:, None])
        correction = tl.exp2(peak - safe)
        if SHARES_KEYS:
            value = key
        else:
            at_value = values + slot[:, None] * value_stride + kv_head * value_head_stride
            is_value = exists[:, None] & (of_value < VALUE_DIM)[None, :]
            value = expanded(tl.load(at_value + of_value[None, :], is_value, 0), CODES, kind)
        if CODES > 0:
            total = total * correction + tl.sum(weights, 1)
            unit = tl.load(value_scales + slot * (HEADS // SHARED) + kv_head, exists, 0.0) * code_unit(CODES)
            weights *= unit[None, :]
            if kind == tl.float16:
                # Of small values the product would lie below float16's range: each row by its own largest.
                largest = tl.max(weights, 1)
                largest = tl.where(largest > 0.0, largest, 1.0)
                factors = rounded(weights / largest[:, None], kind)
                part = product(factors, value, tl.zeros_like(result))
                result = result * correction[:, None] + part * largest[:, None]
            else:
                result = product(rounded(weights, kind), value, result * correction[:, None])
        else:
            factors = rounded(weights, kind)
            total = total * correction + tl.sum(factors.to(tl.float32), 1)
            result = product(factors, value, result * correction[:, None])
        peak = new_peak

    if SPLITS > 1:
        num_splits = tl.num_programs(2)
        place_of = (tile.to(tl.int64) * num_splits + split) * HEADS + head
        tl.store(peaks + place_of, peak, is_real)
        tl.store(peaks + num_tiles * num_splits * HEADS + place_of, total, is_real)
        at_out = partial + place_of[:, None] * VALUE_DIM + of_value[None, :]
        tl.store(at_out, result, is_real[:, None] & (of_value < VALUE_DIM)[None, :])
        return
    if HAS_SINKS:
        sink = tl.load(sinks + head, is_real, 0.0) * LOG2_E
        final = tl.maximum(peak, sink)
        total = total * tl.exp2(peak - final) + tl.exp2(sink - final)
        result *= tl.exp2(peak - final)[:, None]
    result = result / tl.where(is_real, total, 1.0)[:, None]
    at_out = out + (row * HEADS + head)[:, None] * VALUE_DIM + of_value[None, :]
    tl.store(at_out, rounded(result, out.dtype.element_ty), is_real[:, None] & (of_value < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["num_tiles", "num_splits", "window", "chunk"], do_not_specialize_on_alignment=["tiles"])
def combine(
    partial,
    peaks,
    sinks,
    tiles,
    out,
    num_tiles,
    num_splits,
    window,
    chunk,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LEAST: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One row and head of its splits' results."""
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + tile)
    position = tl.load(tiles + num_tiles + tile).to(tl.int32)
    _, _, parts = span(position, 1, window, chunk, 0, BLOCK_N, SPLITS, LEAST)
    split = tl.arange(0, SPLITS)
    place = (tile.to(tl.int64) * num_splits + split) * HEADS + head
    peak = tl.load(peaks + place, split < parts, float("-inf"))
    total = tl.load(peaks + num_tiles * num_splits * HEADS + place, split < parts, 0.0)
    final = tl.max(peak, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head) * LOG2_E
        final = tl.maximum(final, sink)
    weight = tl.exp2(peak - final)
    sum_of_all = tl.sum(weight * total, 0)
    if HAS_SINKS:
        sum_of_all += tl.exp2(sink - final)
    column = tl.arange(0, BLOCK_V)
    is_there = (split < parts)[:, None] & (column < VALUE_DIM)[None, :]
    parts_of_value = tl.load(partial + place[:, None] * VALUE_DIM + column[None, :], is_there, 0.0)
    result = tl.sum(weight[:, None] * parts_of_value, 0) / sum_of_all
    at_out = out + (row * HEADS + head) * VALUE_DIM + column
    tl.store(at_out, rounded(result, out.dtype.element_ty), column < VALUE_DIM)
