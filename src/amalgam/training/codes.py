"""Codes of a quantized weight as numbers that can be trained, and back.

In: packed weights of integer and fp8 layouts (`kernels.layouts`). Out: their codes as they stand there, what they may
be, and weights with other codes in the same layout. Must never know: scales' and zero points' values, why codes change.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.kernels.layouts import pack_nibbles, unpack_nibbles
from amalgam.kernels.weights import PackedWeight


class Range(NamedTuple):
    """The least and the largest code."""

    low: float
    high: float


def range_of(packed: PackedWeight, bits: int) -> Range | None:
    """What the codes of a weight with so many bits may be; None where a layout has no codes on a line.

    Narrow codes without zero points lie around the middle of the four bits that they take; see
    `formats.common.integers.from_codes`.
    """
    name, weight = packed.layout.name, packed.parts.get("weight")
    if name == "int4":
        middle = 0 if "zero" in packed.parts else 8 - (1 << (bits - 1))
        return Range(middle, middle + (1 << bits) - 1)
    if name in ("affine4", "affine8"):
        return Range(0, (1 << bits) - 1)
    if name == "scaled8" and weight is not None:
        if weight.dtype is torch.int8:
            return Range(-128, 127)
        largest = torch.finfo(weight.dtype).max
        return Range(-largest, largest)
    return None


def codes_of(packed: PackedWeight) -> Tensor:
    """float32 `[out, in]`."""
    weight = packed.parts["weight"]
    return (unpack_nibbles(weight) if packed.layout.name in ("int4", "affine4") else weight).float()


def with_codes(packed: PackedWeight, codes: Tensor) -> PackedWeight:
    """A weight in the same layout with other codes, float32 `[out, in]`, each on the grid and within its range."""
    weight = codes.to(packed.parts["weight"].dtype)
    if packed.layout.name in ("int4", "affine4"):
        weight = pack_nibbles(weight)
    return replace(packed, parts={**packed.parts, "weight": weight.contiguous()})


def nearest(codes: Tensor, packed: PackedWeight, allowed: Range) -> Tensor:
    """The codes nearest to some numbers, float32; ties go to the even one."""
    clamped = codes.clamp(*allowed)
    dtype = packed.parts["weight"].dtype
    return clamped.to(dtype).float() if dtype.is_floating_point else clamped.round()


def expanded(packed: PackedWeight, codes: Tensor, scale: Tensor) -> Tensor:
    """`(code - zero) × scale`, float32 `[out, in]`: what the layout means, of codes and scales that are trained.

    Args:
        scale: float32, of the shape that the weight's own has.
    """
    rows, columns = packed.shape
    assert packed.block is not None
    zero, group = packed.parts.get("zero"), packed.parts.get("group")
    if packed.layout.name == "scaled8":
        return codes * _over_blocks(scale, packed.block, (rows, columns))
    offset: Tensor | float = 8.0 if zero is None else zero.float()
    if group is not None:
        index = group.long()
        return (codes - (offset[:, index] if isinstance(offset, Tensor) else offset)) * scale[:, index]
    grouped = codes.view(rows, columns // packed.block[1], packed.block[1])
    offset = offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset
    return ((grouped - offset) * scale.unsqueeze(-1)).view(rows, columns)


def in_codes(packed: PackedWeight, values: Tensor) -> Tensor:
    """Which codes, whole or not, would have some values, float32 `[out, in]`; the weight's own where a scale is 0."""
    codes, scale = codes_of(packed), packed.parts["scale"].float()
    own = expanded(packed, codes, scale)
    step = expanded(packed, codes + 1, scale) - own
    return torch.where(step == 0, codes, codes + (values - own) / step)


def _over_blocks(scale: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Scales repeated over their blocks, cropped at the edges; broadcast where there is one."""
    if scale.shape[0] > 1:
        scale = scale.repeat_interleave(block[0], 0)[: shape[0]]
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(block[1], 1)[:, : shape[1]]
    return scale
