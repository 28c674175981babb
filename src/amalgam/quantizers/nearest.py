"""Round to nearest: the largest magnitude of a block sets its scale, and each value takes the nearest code.

Scales, zero points and codes are to the bit those of compressed-tensors' observers and its `quantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.formats.grid import Codes, Grid


def round_to_nearest(weight: Tensor, grid: Grid) -> Codes:
    """See `Quantizer`. Ties go to the even code."""
    assert tuple(weight.shape) == grid.shape, (weight.shape, grid.shape)
    blocks = grid.blocks(weight.float())
    scale, zero = scales_of(*bounds_of(blocks), grid)
    values = grid.nearest(scaled_blocks(blocks, scale, zero)).to(grid.dtype)
    return Codes(grid, grid.matrix(values), scale, zero)


def bounds_of(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each block, and 0 if that is less or more: `Grid.blocks` → `scale_shape`."""
    return blocks.amin(dim=(1, 3)).clamp(max=0), blocks.amax(dim=(1, 3)).clamp(min=0)


def scales_of(least: Tensor, largest: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The finest stored scales, and zero points, that clip nothing between two bounds of each block.

    Scales are rounded to the stored type before anything is divided by them, so that the codes are the best for the
    scale that is read back.
    """
    if not grid.has_zero:
        return grid.stored_scale(torch.maximum(-least, largest) / grid.reach), None
    exact = (largest - least) / (grid.high - grid.low)
    zero = grid.low - least / exact.masked_fill(exact == 0, 1.0)
    return grid.stored_scale(exact), zero.clamp(grid.low, grid.high).round().to(torch.int8)


def scaled_blocks(blocks: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """What is to be rounded to codes: `blocks / scale + zero`."""
    scaled = blocks / scale.float()[:, None, :, None]
    return scaled if zero is None else scaled.add_(zero.float()[:, None, :, None])
