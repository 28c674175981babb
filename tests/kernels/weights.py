"""Random weights in every layout, with the awkward corners: odd sizes, zero points, activation orders, subnormals."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels.layouts import DENSE, INT4, SCALED8, pack_nibbles
from amalgam.kernels.packed import PackedWeight

# (out, in)
SHAPES = ((16, 128), (1, 8), (33, 200), (48, 384), (7, 1000), (130, 264))


def dense(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> PackedWeight:
    values = _normal(shape, seed).to(dtype)
    return PackedWeight(DENSE, shape, {"weight": values})


def coded(shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    """bf16 whose exponents are close together, as trained ones are, but for one value in a thousand."""
    weight = dense(shape, torch.bfloat16, seed)
    values = weight.dense.view(-1)
    values[::2000] *= 64
    values[500::2000] *= 2**-30
    values[1::77] = 0.0
    values[2::77] = -0.0
    return weight


def scattered(shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    """bf16 whose exponents have no 15 in a row that would do for most."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.ldexp(_normal(shape, seed), torch.randint(-16, 16, shape, generator=generator))
    return PackedWeight(DENSE, shape, {"weight": values.bfloat16()})


def int4(
    shape: tuple[int, int],
    group: int,
    *,
    scale_type: torch.dtype = torch.bfloat16,
    has_zero: bool = False,
    has_order: bool = False,
    seed: int = 0,
) -> PackedWeight:
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    groups = columns // group
    parts = {
        "weight": pack_nibbles(torch.randint(0, 16, shape, dtype=torch.uint8, generator=generator)),
        "scale": (torch.rand((rows, groups), generator=generator) * 0.1 + 0.01).to(scale_type),
    }
    if has_zero:
        parts["zero"] = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    if has_order:
        order = torch.randperm(columns, generator=generator)
        parts["group"] = (torch.arange(columns) // group)[order].to(torch.int32)
    return PackedWeight(INT4, shape, parts, (1, group))


def scaled8(shape: tuple[int, int], dtype: torch.dtype, block: tuple[int, int], seed: int = 0) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    if dtype == torch.float8_e4m3fn:
        codes[codes & 0x7F == 0x7F] = 0x05  # not NaN but a subnormal; one code in 16 is one anyway
    grid = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    scale = torch.rand(grid, generator=generator) * 0.1 + 0.01
    return PackedWeight(SCALED8, shape, {"weight": codes.view(dtype), "scale": scale}, block)


def every_layout(shape: tuple[int, int], seed: int = 0) -> dict[str, PackedWeight]:
    """Name → weight, for each layout that the shape allows."""
    columns = shape[1]
    fp8, int8 = torch.float8_e4m3fn, torch.int8
    weights = {
        "fp32": dense(shape, torch.float32, seed),
        "bf16": coded(shape, seed),
        "bf16-scattered": scattered(shape, seed),
        "fp16": dense(shape, torch.float16, seed),
        "fp8-tensor": scaled8(shape, fp8, shape, seed),
        "fp8-channel": scaled8(shape, fp8, (1, columns), seed),
        "fp8-block": scaled8(shape, fp8, (128, 128), seed),
        "fp8-block-odd": scaled8(shape, fp8, (24, 40), seed),
        "int8-channel": scaled8(shape, int8, (1, columns), seed),
        "int8-tensor": scaled8(shape, int8, shape, seed),
        "int8-block": scaled8(shape, int8, (128, 128), seed),
    }
    if columns % 2 == 0:
        weights["int4-channel"] = int4(shape, columns, scale_type=torch.float32, has_zero=True, seed=seed)
        for index, group in enumerate(size for size in (8, 24, 40, 64, 128, 192) if columns % size == 0):
            scale_type = (torch.bfloat16, torch.float16, torch.float32)[index % 3]
            weights[f"int4-{group}"] = int4(shape, group, scale_type=scale_type, seed=seed)
            weights[f"int4-{group}-zero"] = int4(shape, group, scale_type=scale_type, has_zero=True, seed=seed)
            weights[f"int4-{group}-order"] = int4(shape, group, has_zero=group > 8, has_order=True, seed=seed)
    return weights


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
