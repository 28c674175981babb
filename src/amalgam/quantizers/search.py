"""Search for the best clip: of several scales for each block the one with the least squared error.

A few large values of a block need not be exact if the many others gain by it. With calibration, an error counts as
much as the inputs that it meets: what AWQ (Lin et al. 2024, section 3.2) and the MSE observers of published tools do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.formats.grid import Codes, Grid
from amalgam.quantizers.nearest import bounds_of, scaled_blocks, scales_of

_SHARES = tuple(share / 100 for share in range(100, 44, -5))
_POWERS = (2.0, 1.0, 0.5)  # of scales that are powers of two there are no others near
_CHUNK_ROWS = 1024  # more rows at once only take memory


@dataclass(frozen=True)
class ClipSearch:
    """See `Quantizer`.

    Attributes:
        importance: float32 `[in]`, what a squared error of each input's column counts, the mean of x²; or float32
            `[in, in]`, the mean of x xᵀ: then errors of one block count by what they do to the output together. None:
            all the same.
    """

    importance: Tensor | None = None

    def __call__(self, weight: Tensor, grid: Grid) -> Codes:
        assert tuple(weight.shape) == grid.shape, (weight.shape, grid.shape)
        blocks = grid.blocks(weight.float())
        least, largest = bounds_of(blocks)
        shares = _POWERS if grid.scale_dtype is torch.float8_e8m0fnu else _SHARES
        error_of = _Errors(self.importance, grid)
        best: list[Tensor] = []
        for share in shares:
            scale, zero = scales_of(least * share, largest * share, grid)
            values = grid.nearest(scaled_blocks(blocks, scale, zero))
            centred = values if zero is None else values - zero.float()[:, None, :, None]
            error = error_of(centred * scale.float()[:, None, :, None] - blocks)
            found = [error, values, scale.float(), *(() if zero is None else (zero,))]
            if not best:
                best = found
                continue
            is_better = error < best[0]
            best = [
                torch.where(is_better[:, None, :, None] if new.dim() == 4 else is_better, new, old)
                for new, old in zip(found, best, strict=True)
            ]
        _, values, scale, *zeros = best
        codes = grid.matrix(values).to(grid.dtype)
        return Codes(grid, codes, scale.to(grid.scale_dtype), zeros[0] if zeros else None)


class _Errors:
    """The weighted squared error of each block."""

    def __init__(self, importance: Tensor | None, grid: Grid) -> None:
        self._diagonal: Tensor | None = None
        self._moments: Tensor | None = None
        (_, columns), (_, width), (_, beside) = grid.shape, grid.block, grid.scale_shape
        missing = beside * width - columns
        if importance is None:
            return
        if importance.dim() == 1:
            self._diagonal = torch.nn.functional.pad(importance, (0, missing)).view(1, 1, beside, width)
            return
        padded = torch.nn.functional.pad(importance, (0, missing, 0, missing)).view(beside, width, beside, width)
        index = torch.arange(beside)
        self._moments = padded[index, :, index]  # [beside, width, width]

    def __call__(self, errors: Tensor) -> Tensor:
        """`[below, height, beside, width]` → `[below, beside]`."""
        if self._moments is not None:
            weighted = torch.empty_like(errors)
            for start in range(0, errors.shape[0], _CHUNK_ROWS):
                part = errors[start : start + _CHUNK_ROWS]
                weighted[start : start + _CHUNK_ROWS] = torch.einsum("ahbw,bwv->ahbv", part, self._moments)
            return (weighted * errors).sum(dim=(1, 3))
        squares = errors.square()
        return (squares if self._diagonal is None else squares * self._diagonal).sum(dim=(1, 3))
