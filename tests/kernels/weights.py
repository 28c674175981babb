"""Random weights in every layout, with the awkward corners: odd sizes, zero points, activation orders, subnormals."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from amalgam.checkpoint.gguf import BLOCK_TYPES
from amalgam.formats.gguf import FORMATS as GGUF_FORMATS
from amalgam.formats.gguf.blocks import GgufFormat
from amalgam.kernels.layouts import AFFINE4, AFFINE8, CODEBOOKS, DENSE, E2M1, INT4, SCALED8, TABLE4, pack_nibbles
from amalgam.kernels.weights import Layout, PackedWeight

# (out, in)
SHAPES = ((16, 128), (1, 8), (33, 200), (48, 384), (7, 1000), (130, 264), (35, 512), (5, 256))
# What bfloat16 activations are quantized for.
QUANTIZED = ("int", "affine", "q", "iq", "mxfp4", "nvfp4")
# Byte offsets of a block's f16 scales and minima.
_HALVES = {
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "IQ4_NL": (0,),
    "MXFP4": (),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_XS": (0,),
}
_GGUF = {one.type.name: one for one in GGUF_FORMATS if isinstance(one, GgufFormat)}


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


def affine(layout: Layout, shape: tuple[int, int], group: int, scale_type: torch.dtype, seed: int = 0) -> PackedWeight:
    """Floating zero points."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16 if layout is AFFINE4 else 256, shape, dtype=torch.uint8, generator=generator)
    grid = (rows, columns // group)
    parts = {
        "weight": pack_nibbles(codes) if layout is AFFINE4 else codes,
        "scale": ((torch.rand(grid, generator=generator) + 0.1) * (0.1 if layout is AFFINE4 else 0.01)).to(scale_type),
        "zero": ((torch.rand(grid, generator=generator) + 0.5) * (7.5 if layout is AFFINE4 else 128)).to(scale_type),
    }
    return PackedWeight(layout, shape, parts, (1, group))


def blocks(name: str, shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    """Any bits of a GGUF type; scales and minima between 2^-10 and 2^-7, of either sign."""
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    generator = torch.Generator().manual_seed(seed)
    count = shape[0] * shape[1] // block.num_elements
    raw = torch.randint(0, 256, (count, block.num_bytes), dtype=torch.uint8, generator=generator)
    for offset in _HALVES[name]:
        raw[:, offset + 1] = (raw[:, offset + 1] & 0x87) | 0x18
    if name == "MXFP4":
        raw[:, 0] = raw[:, 0] % 8 + 120
    return PackedWeight(_GGUF[name].layouts[0], shape, {"weight": raw.view(shape[0], -1)}, (1, block.num_elements))


def nvfp4(shape: tuple[int, int], how: str, seed: int = 0) -> PackedWeight:
    """`how`: factor or divisor, as two tools publish it."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randn((shape[0], shape[1] // 16), generator=generator) * 8
    parts = {
        "weight": torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, generator=generator),
        "scale": scale.to(torch.float8_e4m3fn),
        "table": torch.tensor(E2M1),
        how: torch.tensor(0.0123 if how == "factor" else 81.3),
    }
    return PackedWeight(TABLE4, shape, parts, (1, 16))


def few_bits(shape: tuple[int, int], bits: int, group: int, *, zero: str = "", seed: int = 0) -> PackedWeight:
    """Codes of a few bits in nibbles, as 1, 2 and 3 bits are loaded. `zero`: none, integer or float."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    parts = {"scale": (torch.rand((rows, columns // group), generator=generator) * 0.1 + 0.01).half()}
    if zero == "integer":
        parts["zero"] = torch.randint(0, (1 << bits) + 1, (rows, columns // group), generator=generator).to(torch.uint8)
    elif zero == "float":
        parts["zero"] = (torch.rand((rows, columns // group), generator=generator) * (1 << bits)).half()
    else:
        codes += 8 - (1 << bits - 1)
    layout = AFFINE4 if zero == "float" else INT4
    return PackedWeight(layout, shape, {"weight": pack_nibbles(codes), **parts}, (1, group))


def nf4(shape: tuple[int, int], group: int, seed: int = 0) -> PackedWeight:
    """A table of floats, none of which bfloat16 can hold."""
    generator = torch.Generator().manual_seed(seed)
    parts = {
        "weight": torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, generator=generator),
        "scale": torch.rand((shape[0], shape[1] // group), generator=generator) * 0.1 + 0.01,
        "table": torch.linspace(-1, 1, 16) ** 3,
    }
    return PackedWeight(TABLE4, shape, parts, (1, group))


def codebooks(
    shape: tuple[int, int], books: int, bits: int, inputs: int, dtype: torch.dtype, seed: int = 0
) -> PackedWeight:
    """Codes of any value that their type has, as they count modulo the number of vectors."""
    generator = torch.Generator().manual_seed(seed)
    code_type = torch.int8 if bits <= 8 else torch.int16
    sizes = (shape[0], shape[1] // inputs, books)
    limits = torch.iinfo(code_type)
    parts = {
        "weight": torch.randint(limits.min, limits.max + 1, sizes, dtype=code_type, generator=generator),
        "codebooks": torch.randn((books, 1 << bits, 1, inputs), generator=generator).to(dtype),
        "scale": (torch.rand((shape[0], 1), generator=generator) * 0.1 + 0.01).to(dtype),
    }
    return PackedWeight(CODEBOOKS, shape, parts, (1, shape[1]))


@cache
def every_layout(shape: tuple[int, int], seed: int = 0) -> Mapping[str, PackedWeight]:
    """Name → weight, for each layout that the shape allows; made once, and left as they are."""
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
            weights[f"affine4-{group}"] = affine(AFFINE4, shape, group, scale_type, seed)
            weights[f"affine8-{group}"] = affine(AFFINE8, shape, group, scale_type, seed)
    for odd in (size for size in (2, 20, 25) if columns % size == 0):
        weights[f"affine8-{odd}"] = affine(AFFINE8, shape, odd, torch.float32, seed)
        weights[f"fp8-block-{odd}"] = scaled8(shape, fp8, (1, odd), seed)
    for bits in (1, 2, 3):
        for zero in ("", "integer", "float"):
            for group in (size for size in (32, 64) if columns % 64 == 0):
                weights[f"int{bits}-{group}-{zero}"] = few_bits(shape, bits, group, zero=zero, seed=seed)
    weights |= {f"nf4-{group}": nf4(shape, group, seed) for group in (4, 8, 64) if columns % group == 0}
    if columns % 16 == 0:
        weights |= {f"nvfp4-{how}": nvfp4(shape, how, seed) for how in ("factor", "divisor")}
    for books, bits, inputs, dtype in (
        (2, 8, 8, torch.float16),
        (1, 11, 8, torch.bfloat16),
        (1, 9, 16, torch.float16),
        (3, 5, 16, torch.float32),
    ):
        if columns % inputs == 0:
            weights[f"codebooks-{books}x{bits}-{inputs}"] = codebooks(shape, books, bits, inputs, dtype, seed)
    weights |= {
        name.lower(): blocks(name, shape, seed) for name in _HALVES if columns % _GGUF[name].type.num_elements == 0
    }
    return weights


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
