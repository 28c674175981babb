"""The same rows times several weights, and rows of a weight, in whatever the weights are stored.

In: activations, weights that kernels read. Out: activations. Must never know: names, plans, requests.

Weights of one kind are multiplied in one launch. Sums are float32. In which order inputs are summed is a matter of the
weights alone: in steps, and where few outputs would not keep a card busy, in several ranges of steps whose sums are
added in order. With few rows, each range has a program of its own, and the last one to finish adds up; with many, one
program does it all, in the same order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, ref

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.backends.triton.kinds import (
    COMMON,
    PUBLISHED,
    ROWS,
    WEIGHT,
    Kind,
    TritonWeight,
    compute_type,
    in_steps,
    kinds_of,
    pointers_of,
    step_of,
    tile_for,
    wide_biases,
)
from amalgam.kernels.backends.triton.launching import FLOAT_TYPES, on_device_of, rounded, runs_on
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.tiles import (
    add_step,
    column_of,
    finished,
    inputs_at,
    parts_of,
    plain,
    pointer,
    scales_at,
    with_factor,
    zeros_at,
)
from amalgam.kernels.backends.triton.variants import Variant
from amalgam.kernels.weights import PackedWeight

# Of several ranges of inputs, each is a program of its own up to so many rows.
_MOST_ROWS_IN_RANGES = 64
# Programs that keep a large card busy, and steps below which a range does not pay.
_ENOUGH_PROGRAMS, _LEAST_STEPS = 256, 4
_MOST_RANGES = 8
_EMBEDDING_WIDTH = 512


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    x,  # [rows, in], with a stride
    table,  # int64 [FIELDS, NUM], pointers to the weights
    out,  # for each weight [rows, its rows], one behind the other
    sums,  # float32 [RANGES, tiles, outputs, rows], what the ranges leave for the last one
    arrived,  # int32 [tiles], how many ranges are through; 0 before and behind
    num_rows,
    stride,
    NUM: tl.constexpr,
    KIND: tl.constexpr,
    COMPUTE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANGES: tl.constexpr,
    IS_APART: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
):
    """Grid: (tiles of rows, tiles of outputs of all weights, ranges if they are apart)."""
    # Which weight the tile is of: its number, the first of its rows, how many it has, where its output begins.
    tile = tl.program_id(1)
    number, first_tile, height, before = 0, 0, 0, 0
    num_tiles, total = 0, 0
    for index in tl.static_range(NUM):
        rows_of_it = tl.load(table + ROWS * NUM + index).to(tl.int32)
        is_behind = tile >= num_tiles
        number = tl.where(is_behind, index, number)
        first_tile = tl.where(is_behind, num_tiles, first_tile)
        height = tl.where(is_behind, rows_of_it, height)
        before = tl.where(is_behind, total, before)
        num_tiles += tl.cdiv(rows_of_it, TILE_OUTPUTS)
        total += rows_of_it
    output = (tile - first_tile) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    is_output = output < height
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    is_row = row < num_rows

    parts = parts_of(table, number, NUM)
    STEPS: tl.constexpr = (KIND.inputs + KIND.step - 1) // KIND.step
    LENGTH: tl.constexpr = (STEPS + RANGES - 1) // RANGES * KIND.step
    result = tl.zeros((TILE_OUTPUTS, TILE_ROWS), tl.float32)
    for index in range(1 if IS_APART else RANGES):
        begin = (tl.program_id(2) if IS_APART else index) * LENGTH
        part = tl.zeros((TILE_OUTPUTS, TILE_ROWS), tl.float32)
        for first in range(begin, min(begin + LENGTH, KIND.inputs), KIND.step):
            rows = inputs_at(x, row, is_row, stride, first, KIND.inputs, KIND.step, COMPUTE)
            part = add_step(part, rows, parts, KIND, output, is_output, first, COMPUTE)
        result += part

    is_last = True
    if IS_APART:
        place = tl.program_id(0) + tl.num_programs(0) * tile
        cell = tl.arange(0, TILE_OUTPUTS)[:, None] * TILE_ROWS + tl.arange(0, TILE_ROWS)[None, :]
        cells = sums + place.to(tl.int64) * (TILE_OUTPUTS * TILE_ROWS) + cell
        apart = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * (TILE_OUTPUTS * TILE_ROWS)
        tl.store(cells + tl.program_id(2) * apart, result)
        tl.debug_barrier()  # of the whole program: what it has stored is out before it counts as arrived
        is_last = tl.atomic_add(arrived + place, 1, sem="acq_rel", scope="gpu") == RANGES - 1
    if is_last:
        if IS_APART:
            result = tl.zeros((TILE_OUTPUTS, TILE_ROWS), tl.float32)
            for index in range(RANGES):
                result += tl.load(cells + index * apart, cache_modifier=".cg")
            tl.store(arrived + place, 0)
        result = finished(result, parts, KIND, output, is_output, HAS_BIAS)
        where = out + tl.cast(before, tl.int64) * num_rows + row.to(tl.int64)[None, :] * height + output[:, None]
        tl.store(where, rounded(result, out.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])


@triton.jit(do_not_specialize_on_alignment=["ids"])
def embedding_kernel(
    ids,  # int64 [rows]
    table,  # int64 [FIELDS, 1]
    out,  # [rows, in]
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row of the weight and `WIDTH` bytes or floats of it, expanded as its layout says. Grid: (rows, widths)."""
    row = tl.load(ids + tl.program_id(0)).to(tl.int64)
    place = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    parts = parts_of(table, 0, 1)
    to = out + tl.program_id(0).to(tl.int64) * KIND.inputs
    if KIND.values == "float":
        is_there = place < KIND.inputs
        value = tl.load(pointer(parts, WEIGHT, KIND.floats) + row * KIND.inputs + place, mask=is_there)
        tl.store(to + place, rounded(value.to(tl.float32), out.dtype.element_ty), mask=is_there)
    else:
        SHARES: tl.constexpr = 2 if KIND.is_narrow else 1
        codes = tl.load(
            pointer(parts, WEIGHT, tl.uint8) + row * (KIND.inputs // SHARES) + place,
            mask=place < KIND.inputs // SHARES,
            other=0,
        )
        for share in tl.static_range(SHARES):
            inputs = place * SHARES + share
            is_there = inputs < KIND.inputs
            column = column_of(parts, KIND, inputs, is_there)
            nibbles = (codes >> 4 if share else codes & 15) if SHARES == 2 else codes
            value = plain(nibbles, parts, KIND)
            if KIND.values == "nibble" or KIND.values == "byte":
                value -= zeros_at(parts, KIND, row, column, is_there)
            scale = with_factor(scales_at(parts, KIND, row, column, is_there), parts, KIND)
            tl.store(to + inputs, rounded(value * scale, out.dtype.element_ty), mask=is_there)


@dataclass(frozen=True, eq=False)
class Stack:
    """Weights of one kind that meet the same rows.

    Attributes:
        places: which of the weights that were asked for they are.
        heights: rows of each.
        table: int64 `[FIELDS, weights]`, on the device.
        ranges: into how many the inputs are parted.
        kept: what the table points to, and the biases as they were given, whose addresses tell stacks apart.
    """

    kind: Kind
    places: tuple[int, ...]
    heights: tuple[int, ...]
    table: Tensor
    has_bias: bool
    ranges: int
    kept: tuple[Tensor, ...]
    _arrived: dict[int, Tensor] = field(default_factory=dict, init=False)

    def arrived(self) -> Tensor:
        """int32 zeros, which every launch leaves as it found them: no two may run at the same time. Those of one thread
        do not. Another one's may, which compares versions, or prepares one, beside the thread that runs steps."""
        thread = threading.get_ident()
        found = self._arrived.get(thread)
        if found is None:
            # Enough for the smallest tiles.
            most = _MOST_ROWS_IN_RANGES // 8 * sum(-(-height // 32) for height in self.heights)
            size = most if self.ranges > 1 else 0
            found = self._arrived[thread] = torch.zeros(size, dtype=torch.int32, device=self.table.device)
        return found


# By the first weight: the others that it was asked for with, and their stacks.
_Asked = tuple[tuple[ref[PackedWeight], ...], tuple[int, ...], tuple[Stack, ...]]
_stacks: WeakKeyDictionary[PackedWeight, list[_Asked]] = WeakKeyDictionary()


def stacks_of(weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> tuple[Stack, ...]:
    """Weights that kernels read, by kind. Made once; asked for while a program is compiled, so that no step waits."""
    asked = tuple(0 if bias is None else bias.data_ptr() for bias in biases)
    known = _stacks.setdefault(weights[0], [])
    for others, pointers, stacks in known:
        if (
            pointers == asked
            and len(others) == len(weights)
            and all(o() is w for o, w in zip(others, weights, strict=True))
        ):
            return stacks
    stacks = tuple(_stack(kind, weights, biases) for kind in kinds_of(weights))
    known[:] = [one for one in known if all(other() is not None for other in one[0])]
    known.append((tuple(map(ref, weights)), asked, stacks))
    return stacks


def _stack(kind: Kind, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> Stack:
    found = [(place, one) for place, one in enumerate(weights) if isinstance(one, TritonWeight) and one.kind == kind]
    places, ours = tuple(place for place, _ in found), [weight for _, weight in found]
    wide = wide_biases(ours, [biases[place] for place in places])
    columns = [pointers_of(weight, bias) for weight, bias in zip(ours, wide, strict=True)]
    kept = [part for weight in ours for part in weight.parts.values()] + [bias for bias in wide if bias is not None]
    kept += [bias for place in places if (bias := biases[place]) is not None]
    heights = tuple(weight.shape[0] for weight in ours)
    table = torch.tensor(columns, dtype=torch.int64).t().contiguous().to(kept[0].device)
    kind = in_steps(kind, step_of([kind]))
    has_bias = any(bias is not None for bias in wide)
    return Stack(kind, places, heights, table, has_bias, _ranges_of(kind, heights), tuple(kept))


def _ranges_of(kind: Kind, heights: Sequence[int]) -> int:
    """How many ranges of inputs keep a card busy with few rows."""
    programs = sum(-(-height // tile_for(1, kind).outputs) for height in heights)
    steps, ranges = -(-kind.inputs // kind.step), 1
    while ranges < _MOST_RANGES and programs * ranges < _ENOUGH_PROGRAMS and steps >= 2 * ranges * _LEAST_STEPS:
        ranges *= 2
    return ranges


def supports_linear(x: Tensor, weight: PackedWeight) -> bool:
    """Whether `linears` takes these."""
    return (
        isinstance(weight, TritonWeight)
        and x.dim() == 2
        and x.dtype in FLOAT_TYPES
        and runs_on(x, weight.parts["weight"])
    )


def linears(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`x Wᵀ + b` of the same rows with several weights: `[rows, in]` → `[rows, out]` each, contiguous.

    What is multiplied has x's type, or with a floating weight of another type the wider of the two; sums are float32,
    and rounded once.

    Args:
        out_dtype: of the results; x's type if None.

    Raises:
        ValueError: rows that do not fit a weight.
    """
    for weight in weights:
        if x.shape[1] != weight.shape[1]:
            raise ValueError(f"rows of {x.shape[1]} inputs and a weight of {weight.shape[1]}")
    x = x if x.stride(1) == 1 else x.contiguous()
    results: list[Tensor] = [x] * len(weights)
    for stack in stacks_of(weights, biases):
        outs = _multiply(x, stack, x.dtype if out_dtype is None else out_dtype)
        for place, out in zip(stack.places, outs, strict=True):
            results[place] = out
    return results


def _multiply(x: Tensor, stack: Stack, out_dtype: torch.dtype) -> list[Tensor]:
    num_rows, kind = x.shape[0], stack.kind
    flat = torch.empty(num_rows * sum(stack.heights), dtype=out_dtype, device=x.device)
    if num_rows:
        compute = compute_type(x.dtype, kind)
        tile = tile_for(num_rows, kind, is_wide=compute == tl.float32)
        grid = [-(-num_rows // tile.rows), sum(-(-height // tile.outputs) for height in stack.heights), 1]
        is_apart = stack.ranges > 1 and num_rows <= _MOST_ROWS_IN_RANGES
        sums = arrived = stack.arrived()
        if is_apart:
            grid[2] = stack.ranges
            sums = torch.empty(grid[0] * grid[1] * grid[2] * tile.rows * tile.outputs, device=x.device)
        with on_device_of(x):
            linear_kernel[tuple(grid)](
                x,
                stack.table,
                flat,
                sums,
                arrived,
                num_rows,
                x.stride(0),
                NUM=len(stack.heights),
                KIND=kind,
                COMPUTE=compute,
                HAS_BIAS=stack.has_bias,
                RANGES=stack.ranges,
                IS_APART=is_apart,
                TILE_ROWS=tile.rows,
                TILE_OUTPUTS=tile.outputs,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **OPTIONS,
            )
    outs = flat.split([num_rows * height for height in stack.heights])
    return [out.view(num_rows, height) for out, height in zip(outs, stack.heights, strict=True)]


def supports_embedding(ids: Tensor, weight: PackedWeight) -> bool:
    """Whether `embedding` takes these."""
    return isinstance(weight, TritonWeight) and ids.dim() == 1 and runs_on(ids, weight.parts["weight"])


def embedding(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of a weight, with the bits of `PackedWeight.dequantize`: int64 `[rows]` → `[rows, in]` in `dtype`."""
    (stack,) = stacks_of((weight,), (None,))
    kind = stack.kind
    out = torch.empty((len(ids), kind.inputs), dtype=dtype, device=ids.device)
    places = kind.inputs // 2 if kind.is_narrow else kind.inputs
    if len(ids):
        with on_device_of(ids):
            grid = (len(ids), -(-places // _EMBEDDING_WIDTH))
            embedding_kernel[grid](ids, stack.table, out, KIND=kind, WIDTH=_EMBEDDING_WIDTH, **OPTIONS)
    return out


def _variants() -> Iterator[Variant]:
    """What the projections of Qwen3-30B-A3B launch: queries, keys and values in one, the way back, the head."""
    qkv, back, head = ((4096, 512, 512), 2048), ((2048,), 4096), ((151936,), 2048)
    for name, kind in PUBLISHED.items():
        for rows in (1, 16, 64, 512) if name in COMMON else (1, 512):
            yield _variant(f"queries, keys, values {name}, rows={rows}", kind, *qkv, rows)
    for name in COMMON:
        for rows in (1, 64):
            yield _variant(f"attention's output {name}, rows={rows}", PUBLISHED[name], *back, rows)
    for rows in (1, 512):
        yield _variant(f"router bf16 in float32, rows={rows}", PUBLISHED["bf16"], (128,), 2048, rows, "*fp32", "fp32")
    for name in COMMON:
        kind = in_steps(PUBLISHED[name].of(2048), 128)
        constants = {"KIND": kind, "WIDTH": _EMBEDDING_WIDTH}
        signature = {"ids": "*i64", "table": "*i64", "out": "*bf16"}
        yield Variant(f"embedding {name}", embedding_kernel, signature, constants)
    for rows in (1, 64):
        yield _variant(f"head bf16, rows={rows}", PUBLISHED["bf16"], *head, rows, "*fp32")


def _variant(
    name: str, kind: Kind, heights: Sequence[int], inputs: int, rows: int, out: str = "*bf16", x: str = "bf16"
) -> Variant:
    kind = kind.of(inputs)
    kind = in_steps(kind, step_of([kind]))
    tile, ranges = tile_for(rows, kind, is_wide=x == "fp32"), _ranges_of(kind, heights)
    constants = {
        "NUM": len(heights),
        "KIND": kind,
        "COMPUTE": tl.float32 if x == "fp32" else tl.bfloat16,
        "HAS_BIAS": False,
        "RANGES": ranges,
        "IS_APART": ranges > 1 and rows <= _MOST_ROWS_IN_RANGES,
        "TILE_ROWS": tile.rows,
        "TILE_OUTPUTS": tile.outputs,
    }
    signature = {"x": f"*{x}", "table": "*i64", "out": out, "sums": "*fp32", "arrived": "*i32"}
    signature |= {"num_rows": "i32", "stride": "i32"}
    return Variant(name, linear_kernel, signature, constants, tile.num_warps, tile.num_stages)


VARIANTS = tuple(_variants())
