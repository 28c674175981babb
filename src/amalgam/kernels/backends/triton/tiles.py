"""The inner loop of every product: a tile of outputs, step by step of inputs, from the bytes that a weight is made of.

In: pointers. Out: sums in float32. Must never know: how tiles are chosen.

The weight is the left operand: a tile of its rows stays in registers, where it is expanded, and the few rows of
activations lie in shared memory. Two values of a byte are never put beside each other. The low ones meet the even
inputs, the high ones the odd inputs.
"""

# Triton compiles what follows a return, if it is not in an else.
# ruff: noqa: RET505

from __future__ import annotations

import triton
import triton.language as tl

from amalgam.kernels.backends.triton.kinds import BIAS, FACTOR, GROUP, SCALE, TABLE, WEIGHT, ZERO
from amalgam.kernels.backends.triton.launching import IS_INTERPRETED, product, rounded
from amalgam.kernels.backends.triton.numbers import e2m1, e4m3, e8m0

_INTERPRETED = tl.constexpr(IS_INTERPRETED)


@triton.jit
def parts_of(table, number, NUM: tl.constexpr):
    """Where a table `[fields, NUM]` says that the parts of weight `number` begin: integers, read before the loop."""
    return (
        tl.load(table + WEIGHT * NUM + number),
        tl.load(table + SCALE * NUM + number),
        tl.load(table + ZERO * NUM + number),
        tl.load(table + GROUP * NUM + number),
        tl.load(table + TABLE * NUM + number),
        tl.load(table + FACTOR * NUM + number),
        tl.load(table + BIAS * NUM + number),
    )


@triton.jit
def pointer(parts, FIELD: tl.constexpr, TYPE: tl.constexpr):
    """To the beginning of a part, where loads of many bytes are allowed."""
    return tl.multiple_of(parts[FIELD].to(tl.pointer_type(TYPE)), 16)


@triton.jit
def scales_at(parts, KIND: tl.constexpr, row, column, is_there):
    """float32 scales of some rows and columns of blocks; without a factor."""
    offsets = (row // KIND.block[0]).to(tl.int64) * KIND.columns + column
    if KIND.scale == tl.float8e4nv:
        return e4m3(tl.load(pointer(parts, SCALE, tl.uint8) + offsets, mask=is_there, other=0))
    elif KIND.scale == tl.uint8:
        return e8m0(tl.load(pointer(parts, SCALE, tl.uint8) + offsets, mask=is_there, other=127))
    else:
        return tl.load(pointer(parts, SCALE, KIND.scale) + offsets, mask=is_there, other=0.0).to(tl.float32)


@triton.jit
def zeros_at(parts, KIND: tl.constexpr, row, column, is_there):
    """float32 zero points of some rows and columns of groups."""
    if KIND.zero is None:
        return tl.full(is_there.shape, 8.0, tl.float32)
    else:
        offsets = row.to(tl.int64) * KIND.columns + column
        return tl.load(pointer(parts, ZERO, KIND.zero) + offsets, mask=is_there, other=0).to(tl.float32)


@triton.jit
def with_factor(scales, parts, KIND: tl.constexpr):
    """Scales, or sums, with what multiplies or divides all of them."""
    if KIND.factor == "factor":
        return scales * tl.load(pointer(parts, FACTOR, tl.float32))
    elif KIND.factor == "divisor":
        return scales / tl.load(pointer(parts, FACTOR, tl.float32))
    else:
        return scales


@triton.jit
def spread(values, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """`[rows, n]` → `[rows, width]`, each value repeated."""
    NUM: tl.constexpr = values.shape[1]
    return tl.reshape(tl.broadcast_to(values[:, :, None], (ROWS, NUM, WIDTH // NUM)), (ROWS, WIDTH))


@triton.jit
def column_of(parts, KIND: tl.constexpr, inputs, is_there):
    """Which column of the scales some inputs belong to."""
    if KIND.ordered:
        return tl.load(pointer(parts, GROUP, tl.int32) + inputs, mask=is_there, other=0)
    else:
        return inputs // KIND.block[1]


@triton.jit
def plain(codes, parts, KIND: tl.constexpr):
    """float32 values of codes, uint8, without zero point and scale."""
    if KIND.values == "e2m1":
        return e2m1(codes)
    elif KIND.values == "table":
        return tl.load(pointer(parts, TABLE, tl.float32) + codes.to(tl.int32))
    elif KIND.values == "e4m3":
        return e4m3(codes)
    elif KIND.values == "int8":
        return codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        return codes.to(tl.float32)


@triton.jit
def expand(codes, parts, KIND: tl.constexpr, row, is_row, inputs, first, COMPUTE: tl.constexpr):
    """Codes, uint8 `[rows, n]`, as what is multiplied; with their scales, where those are not for the sums.

    inputs: `[n]`, of the values; first: of the step's inputs.
    """
    NUM_ROWS: tl.constexpr = codes.shape[0]
    WIDTH: tl.constexpr = codes.shape[1]
    IS_OFFSET: tl.constexpr = KIND.values == "nibble" or KIND.values == "byte"
    if KIND.scaling == "end" or KIND.scaling == "step":
        if KIND.values == "nibble":
            zero = zeros_at(parts, KIND, row, first // KIND.block[1], is_row)[:, None]
            if _INTERPRETED or COMPUTE != tl.bfloat16:
                return (codes.to(tl.float32) - zero).to(COMPUTE)
            else:
                # The interpreter would take bfloat16 for integers. 0x4300 is 128 in it, whose last bit then counts 1:
                # an integer below 128 lies there as it is.
                shifted = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
                return shifted - (zero + 128.0).to(tl.bfloat16)
        elif KIND.values == "e4m3" and KIND.is_native:
            return codes.to(tl.float8e4nv, bitcast=True).to(COMPUTE)
        else:
            return plain(codes, parts, KIND).to(COMPUTE)
    else:
        value = plain(codes, parts, KIND)
        if KIND.scaling == "parts":
            NUM_PARTS: tl.constexpr = KIND.step // KIND.block[1] if KIND.step > KIND.block[1] else 1
            part = first // KIND.block[1] + tl.arange(0, NUM_PARTS)
            is_part = is_row[:, None] & (part < KIND.columns)[None, :]
            scale = spread(scales_at(parts, KIND, row[:, None], part[None, :], is_part), NUM_ROWS, WIDTH)
            if IS_OFFSET:
                zero = zeros_at(parts, KIND, row[:, None], part[None, :], is_part)
                value -= spread(zero, NUM_ROWS, WIDTH)
        else:
            column = column_of(parts, KIND, inputs, inputs < KIND.inputs)
            is_there = is_row[:, None] & (inputs < KIND.inputs)[None, :]
            scale = scales_at(parts, KIND, row[:, None], column[None, :], is_there)
            if IS_OFFSET:
                value -= zeros_at(parts, KIND, row[:, None], column[None, :], is_there)
        return rounded(value * scale, COMPUTE)


@triton.jit
def codes_at(parts, row, is_row, byte, WIDTH: tl.constexpr):
    """uint8 `[rows, n]`; width: bytes in a row of the weight."""
    where = pointer(parts, WEIGHT, tl.uint8) + row.to(tl.int64)[:, None] * WIDTH + byte[None, :]
    return tl.load(where, mask=is_row[:, None] & (byte < WIDTH)[None, :], other=0)


@triton.jit
def add_step(sums, x, parts, KIND: tl.constexpr, row, is_row, first, COMPUTE: tl.constexpr):
    """sums + W xᵀ over the step's inputs from `first` on.

    sums: float32 `[outputs, rows]`; x: `[rows, step]`, 0 where there are no inputs; row: `[outputs]`, of the weight.
    """
    STEP: tl.constexpr = KIND.step
    NUM_ROWS: tl.constexpr = x.shape[0]
    part = tl.zeros_like(sums) if KIND.scaling == "step" else sums
    if KIND.values == "float":
        inputs = first + tl.arange(0, STEP)
        where = pointer(parts, WEIGHT, KIND.floats) + row.to(tl.int64)[:, None] * KIND.inputs + inputs[None, :]
        value = tl.load(where, mask=is_row[:, None] & (inputs < KIND.inputs)[None, :], other=0.0)
        part = product(value.to(COMPUTE), tl.trans(x), part)
    elif KIND.is_narrow:
        byte = first // 2 + tl.arange(0, STEP // 2)
        codes = codes_at(parts, row, is_row, byte, KIND.inputs // 2)
        even, odd = tl.split(tl.reshape(x, (NUM_ROWS, STEP // 2, 2)))
        low = expand(codes & 15, parts, KIND, row, is_row, 2 * byte, first, COMPUTE)
        high = expand(codes >> 4, parts, KIND, row, is_row, 2 * byte + 1, first, COMPUTE)
        part = product(low, tl.trans(even), part)
        part = product(high, tl.trans(odd), part)
    else:
        inputs = first + tl.arange(0, STEP)
        codes = codes_at(parts, row, is_row, inputs, KIND.inputs)
        value = expand(codes, parts, KIND, row, is_row, inputs, first, COMPUTE)
        part = product(value, tl.trans(x), part)
    if KIND.scaling == "step":
        scale = scales_at(parts, KIND, row, first // KIND.block[1], is_row)
        return sums + part * scale[:, None]
    else:
        return part


@triton.jit
def finished(sums, parts, KIND: tl.constexpr, row, is_row, HAS_BIAS: tl.constexpr):
    """Sums with what is left to do once: scales of whole rows, a factor, the bias."""
    if KIND.scaling == "end":
        sums *= scales_at(parts, KIND, row, 0, is_row)[:, None]
    sums = with_factor(sums, parts, KIND)
    if HAS_BIAS:
        sums += tl.load(pointer(parts, BIAS, tl.float32) + row, mask=is_row, other=0.0)[:, None]
    return sums


@triton.jit
def inputs_at(x, row, is_row, stride, first, INPUTS: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr):
    """A step's inputs of some rows, `[rows, step]`."""
    column = first + tl.arange(0, STEP)
    where = x + row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(where, mask=is_row[:, None] & (column < INPUTS)[None, :], other=0.0).to(COMPUTE)
