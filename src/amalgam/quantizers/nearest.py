"""Round to nearest: the largest magnitude of a block sets its scale, and each value takes the nearest code.

Scales and codes are to the bit those of compressed-tensors' observers and its `quantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from amalgam.formats.grid import Codes, Grid


def round_to_nearest(weight: Tensor, grid: Grid) -> Codes:
    """See `Quantizer`. Ties go to the even code."""
    assert tuple(weight.shape) == grid.shape, (weight.shape, grid.shape)
    (rows, columns), (height, width), (below, beside) = grid.shape, grid.block, grid.scale_shape
    padded = pad(weight.float(), (0, -columns % width, 0, -rows % height))
    blocks = padded.view(below, height, beside, width)
    # Rounded to the stored type first, so that the codes are the best for the scale that is read back.
    scale = (blocks.abs().amax(dim=(1, 3)) / grid.reach).to(grid.scale_dtype)
    scale = scale.masked_fill(scale == 0, torch.finfo(grid.scale_dtype).eps)
    scaled = blocks / scale.float()[:, None, :, None]
    if not grid.dtype.is_floating_point:
        scaled = scaled.round()
    values = scaled.clamp(grid.low, grid.high).to(grid.dtype).view(padded.shape)
    return Codes(grid, values[:rows, :columns].contiguous(), scale)
