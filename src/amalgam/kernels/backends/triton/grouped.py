"""The kernels of a mixture of experts: sort the tokens by expert, multiply, and add up.

In: a routing, a table of pointers. Out: activations. Must never know: how launches are chosen.

A slot is a token's choice, token × k + choice. Each expert's slots are put one behind the other, and cut into tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.kernels.backends.triton.kinds import FIELDS
from amalgam.kernels.backends.triton.launching import rounded
from amalgam.kernels.backends.triton.tiles import add_step, finished, inputs_at, parts_of

# Rows of a layer's table, int64 [TABLE_ROWS, experts]: pointers of gate, up and down, and an expert's two launches.
_GATE, _UP, _DOWN, _LAUNCHES = (tl.constexpr(part * FIELDS.value) for part in range(4))
TABLE_ROWS = 3 * FIELDS.value + 2


@triton.jit(do_not_specialize=["num_slots", "num_tiles"])
def sort_kernel(
    ids,  # int64 or int32 [slots], experts, -1: none; slot = token × k + choice
    table,  # int64 [TABLE_ROWS, NUM]
    order,  # int32 [slots], slots by expert, those of one expert ascending
    tiles,  # int32 [LAUNCHES, num_tiles, 3], expert, first place in the order, end of the expert's places
    counts,  # int32 [LAUNCHES], tiles of each launch
    num_slots,
    num_tiles,
    NUM: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two from NUM on
    LAUNCHES: tl.constexpr,
    FIRSTS: tl.constexpr,  # how many of them are of gate and up
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each expert finds its slots. Grid: (experts,)."""
    expert = tl.program_id(0)
    experts = tl.arange(0, WIDTH)
    heights = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        here = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
        heights += tl.histogram(tl.maximum(here, 0), WIDTH, mask=here >= 0)
    first = tl.sum(tl.where(experts < expert, heights, 0))
    end = first + tl.sum(tl.where(experts == expert, heights, 0))

    place = first
    for start in range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        is_ours = tl.load(ids + slot, mask=slot < num_slots, other=NUM).to(tl.int32) == expert
        before = tl.cumsum(is_ours.to(tl.int32), 0)
        tl.store(order + place + before - 1, slot, mask=is_ours)
        place += tl.sum(is_ours.to(tl.int32))

    needed = (heights + TILE_ROWS - 1) // TILE_ROWS
    for stage in tl.static_range(2):
        launches = tl.load(table + (_LAUNCHES + stage) * NUM + experts, mask=experts < NUM, other=-1).to(tl.int32)
        launch = tl.load(table + (_LAUNCHES + stage) * NUM + expert).to(tl.int32)
        entry = tl.sum(tl.where((launches == launch) & (experts < expert), needed, 0))
        for begin in range(first, end, TILE_ROWS):
            where = tiles + (launch * num_tiles + entry) * 3
            tl.store(where, expert)
            tl.store(where + 1, begin)
            tl.store(where + 2, end)
            entry += 1
        if expert == 0:
            for number in tl.static_range(LAUNCHES):
                if (number < FIRSTS) == (stage == 0):
                    tl.store(counts + number, tl.sum(tl.where(launches == number, needed, 0)))


@triton.jit
def activated(
    gate,
    up,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_GELU: tl.constexpr,
    LIMITS_LAST: tl.constexpr,
):
    """Gate and up, float32, joined as `GatedActivation` says."""
    if LIMIT is not None:
        if not LIMITS_LAST:
            gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    if IS_GELU:
        first = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        first = gate / (1.0 + tl.exp(-ALPHA * gate))
    if LIMIT is not None and LIMITS_LAST:
        first = tl.minimum(first, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return first * (up + OFFSET)


@triton.jit
def _own_tile(tiles, num_tiles, outputs, LAUNCH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_OUTPUTS: tl.constexpr):
    """Of one program: its expert, places in the order and which are the expert's, outputs and which there are."""
    tile = tiles + (LAUNCH * num_tiles + tl.program_id(0)) * 3
    place = tl.load(tile + 1) + tl.arange(0, TILE_ROWS)
    output = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    return tl.load(tile), place, place < tl.load(tile + 2), output, output < outputs


@triton.jit(do_not_specialize=["num_tiles"])
def up_kernel(
    x,  # [tokens, in], with a stride
    table,  # int64 [TABLE_ROWS, NUM]
    order,
    tiles,
    counts,
    inner,  # [slots, outputs], by place in the order
    num_tiles,
    stride,
    outputs,
    LAUNCH: tl.constexpr,
    CHOICES: tl.constexpr,
    NUM: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_GELU: tl.constexpr,
    LIMITS_LAST: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    """Gate and up of a launch's experts, joined. Grid: (tiles that there could be, tiles of outputs)."""
    if tl.program_id(0) >= tl.load(counts + LAUNCH):
        return
    expert, place, is_row, output, is_output = _own_tile(tiles, num_tiles, outputs, LAUNCH, TILE_ROWS, TILE_OUTPUTS)
    row = tl.load(order + place, mask=is_row, other=0) // CHOICES
    gate_parts = parts_of(table + _GATE * NUM, expert, NUM)
    up_parts = parts_of(table + _UP * NUM, expert, NUM)
    gate = tl.zeros((TILE_OUTPUTS, TILE_ROWS), tl.float32)
    up = tl.zeros((TILE_OUTPUTS, TILE_ROWS), tl.float32)
    for first in range(0, GATE.inputs, GATE.step):
        rows = inputs_at(x, row, is_row, stride, first, GATE.inputs, GATE.step, COMPUTE)
        gate = add_step(gate, rows, gate_parts, GATE, output, is_output, first, COMPUTE)
        up = add_step(up, rows, up_parts, UP, output, is_output, first, COMPUTE)
    gate = finished(gate, gate_parts, GATE, output, is_output, HAS_BIAS)
    up = finished(up, up_parts, UP, output, is_output, HAS_BIAS)
    value = activated(gate, up, ALPHA, OFFSET, LIMIT, IS_GELU, LIMITS_LAST)
    where = inner + place.to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(where, rounded(value, inner.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def down_kernel(
    inner,  # [slots, in], by place in the order
    table,
    order,
    tiles,
    counts,
    outer,  # [slots, outputs], by slot: values of inner's type, in that or a wider one
    num_tiles,
    outputs,
    LAUNCH: tl.constexpr,
    NUM: tl.constexpr,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    """Down of a launch's experts. Grid: (tiles that there could be, tiles of outputs)."""
    if tl.program_id(0) >= tl.load(counts + LAUNCH):
        return
    expert, place, is_row, output, is_output = _own_tile(tiles, num_tiles, outputs, LAUNCH, TILE_ROWS, TILE_OUTPUTS)
    parts = parts_of(table + _DOWN * NUM, expert, NUM)
    sums = tl.zeros((TILE_OUTPUTS, TILE_ROWS), tl.float32)
    for first in range(0, KIND.inputs, KIND.step):
        rows = inputs_at(inner, place, is_row, KIND.inputs, first, KIND.inputs, KIND.step, COMPUTE)
        sums = add_step(sums, rows, parts, KIND, output, is_output, first, COMPUTE)
    sums = finished(sums, parts, KIND, output, is_output, HAS_BIAS)
    slot = tl.load(order + place, mask=is_row, other=0)
    where = outer + slot.to(tl.int64)[None, :] * outputs + output[:, None]
    value = rounded(sums, inner.dtype.element_ty).to(outer.dtype.element_ty)
    tl.store(where, value, mask=is_output[:, None] & is_row[None, :])


@triton.jit
def sum_kernel(outer, ids, gate_weights, out, width, CHOICES: tl.constexpr, BLOCK: tl.constexpr):
    """Each token's choices, weighted, in their order. Grid: (tokens, blocks of outputs). ids: as in `sort_kernel`."""
    token, output = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        slot = token * CHOICES + choice
        is_chosen = output < tl.where(tl.load(ids + slot) >= 0, width, 0)
        value = tl.load(outer + slot * width + output, mask=is_chosen, other=0.0).to(tl.float32)
        total += tl.where(is_chosen, value * tl.load(gate_weights + slot), 0.0)
    tl.store(out + token * width + output, rounded(total, out.dtype.element_ty), mask=output < width)
