"""What a quantizer and a format say to each other: the values that a weight can take, and those that it takes.

In: nothing. Out: nouns. Must never know: how values are chosen, how they are stored.

A format that can be made says its `Grid` for a weight; a quantizer chooses `Codes` on it; the format encodes them as
its tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

# E8M0 (OCP Microscaling 1.0): the least power of two that is a normal number, and the largest.
_LEAST_POWER, _LARGEST_POWER = -126, 127


@dataclass(frozen=True)
class QuantizeOptions:
    """What may be asked of a format's grid; None leaves the choice to the format.

    Attributes:
        group_size: inputs that share a scale.
        scale: which weights share a scale: tensor, channel, group or block.
        has_zero_points: whether the code that means 0 is chosen for each block.
    """

    group_size: int | None = None
    scale: str | None = None
    has_zero_points: bool = False


@dataclass(frozen=True)
class Grid:
    """The values that a matrix can take in a format: `(code - zero) × scale`, one scale for each block of it.

    Attributes:
        shape: `(out, in)` of the matrix.
        block: `(rows, columns)` that share a scale; blocks at the end may be smaller.
        strategy: what compressed-tensors calls the choice of blocks: tensor, channel, group or block.
        dtype: of a code: int8, or 8-bit floating point.
        low, high: the least and the largest code.
        reach: how many scales the largest magnitude of a block is, if nothing is clipped; where scales are powers of
            two, it is that or less than twice as many.
        scale_dtype: in which scales are stored. float8_e8m0fnu: powers of two, rounded down.
        has_zero: whether each block has a zero point, a code; without, 0 means 0.
        half_levels: of floating codes the magnitudes from 0 on, if not every value of `dtype` is one.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    strategy: str
    dtype: torch.dtype
    low: float
    high: float
    reach: float
    scale_dtype: torch.dtype
    has_zero: bool = False
    half_levels: tuple[float, ...] | None = None

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Blocks below and beside each other."""
        return num_blocks(self.shape, self.block)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The codes nearest to some numbers, which may be overwritten, as float32; ties go to the even code."""
        if not self.dtype.is_floating_point:
            return scaled.round_().clamp_(self.low, self.high)
        scaled = scaled.clamp(self.low, self.high)
        if self.half_levels is None:
            return scaled.to(self.dtype).float()
        levels = torch.tensor(self.half_levels)
        middles = (levels[1:] + levels[:-1]) / 2
        magnitude = scaled.abs()
        below, above = torch.bucketize(magnitude, middles), torch.bucketize(magnitude, middles, right=True)
        index = torch.where(below % 2 == 0, below, above)
        return levels[index] * scaled.sign()

    def stored_scale(self, scale: Tensor) -> Tensor:
        """Scales in their stored type; none is 0."""
        if self.scale_dtype is torch.float8_e8m0fnu:
            power = torch.frexp(scale.float()).exponent - 1
            power = power.masked_fill(scale == 0, _LEAST_POWER).clamp(_LEAST_POWER, _LARGEST_POWER)
            return torch.ldexp(torch.ones(power.shape), power).to(self.scale_dtype)
        stored = scale.to(self.scale_dtype)
        return stored.masked_fill(stored == 0, torch.finfo(self.scale_dtype).eps)

    def blocks(self, matrix: Tensor) -> Tensor:
        """A matrix `[out, in]` as `[blocks below, rows, blocks beside, columns]`, zeros behind its ends."""
        (rows, columns), (height, width), (below, beside) = self.shape, self.block, self.scale_shape
        if rows % height or columns % width:
            matrix = pad(matrix, (0, -columns % width, 0, -rows % height))
        return matrix.reshape(below, height, beside, width)

    def matrix(self, blocks: Tensor) -> Tensor:
        """What `blocks` was made of."""
        rows, columns = self.shape
        below, height, beside, width = blocks.shape
        return blocks.reshape(below * height, beside * width)[:rows, :columns].contiguous()


@dataclass(frozen=True)
class Codes:
    """A quantized matrix, not yet in any layout.

    Attributes:
        values: `[out, in]` of the grid's type, from `low` to `high`.
        scale: `[blocks below each other, blocks beside each other]` of the grid's `scale_dtype`, above 0.
        zero: int8 `[…]` as `scale`, from `low` to `high`, where the grid has zero points.
    """

    grid: Grid
    values: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The values that the matrix has now, float32 `[out, in]`."""
        codes = self.grid.blocks(self.values.to(torch.float32, copy=True))
        if self.zero is not None:
            codes -= self.zero.float()[:, None, :, None]
        codes *= self.scale.float()[:, None, :, None]
        return self.grid.matrix(codes)


@dataclass(frozen=True)
class Encoded:
    """A quantized matrix in its published layout: tensors by suffix, ready to be written or packed."""

    grid: Grid
    tensors: Mapping[str, Tensor]


def num_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks of a matrix stand below and beside each other."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
