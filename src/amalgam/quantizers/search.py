"""Search for the best scales: of several for each block the one with the least squared error.

A few large values of a block need not be exact if the many others gain by it. With calibration what counts is the error
of the output, x (w - q), as in AWQ (Lin et al. 2024, section 3.2): with the mean of x xᵀ, H, that is (w - q)ᵀ H (w - q)
for each row. Blocks of a row are then chosen one after the other, each with the errors of the others in view; at the
end each scale moves to where the error is least for the codes that it has led to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from amalgam.formats.grid import Codes, Grid
from amalgam.quantizers.nearest import bounds_of, scaled_blocks, scales_of

# Of the scale that clips nothing; above 1, the largest value of a symmetric grid takes the last code instead of half
# way beyond it.
_SHARES = tuple(share / 20 for share in range(21, 10, -1))
_POWERS = (2.0, 1.0, 0.5)  # scales that are powers of two have no others near
_SWEEPS = 2
_REFITS = 2


@dataclass(frozen=True)
class ClipSearch:
    """See `Quantizer`.

    Attributes:
        second_moment: float32 `[in, in]`, the mean of x xᵀ over the inputs; None: all inputs count the same.
    """

    second_moment: Tensor | None = None

    def __call__(self, weight: Tensor, grid: Grid) -> Codes:
        assert tuple(weight.shape) == grid.shape, (weight.shape, grid.shape)
        blocks = grid.blocks(weight.float())
        found = _plain(blocks, grid) if self.second_moment is None else _with_inputs(blocks, grid, self.second_moment)
        values = grid.matrix(found.values).to(grid.dtype)
        return Codes(grid, values, found.scale.to(grid.scale_dtype), found.zero)


@dataclass
class _Found:
    """Codes of blocks as `Grid.blocks` has them, float32 for now, and what they cost."""

    values: Tensor
    scale: Tensor
    zero: Tensor | None
    error: Tensor

    def take(self, other: _Found) -> None:
        """What costs less of two, block by block."""
        better = other.error < self.error
        self.values = torch.where(better[:, None, :, None], other.values, self.values)
        self.scale = torch.where(better, other.scale, self.scale)
        self.error = torch.where(better, other.error, self.error)
        if self.zero is not None and other.zero is not None:
            self.zero = torch.where(better, other.zero, self.zero)

    def restored(self) -> Tensor:
        """The values of the blocks."""
        centred = self.values if self.zero is None else self.values - self.zero.float()[:, None, :, None]
        return centred * self.scale[:, None, :, None]


def _candidates(blocks: Tensor, grid: Grid) -> Iterator[_Found]:
    """Codes with every share of the widest scales; they cost nothing yet."""
    least, largest = bounds_of(blocks)
    for share in _POWERS if grid.scale_dtype is torch.float8_e8m0fnu else _SHARES:
        yield _rounded(blocks, grid, *scales_of(least * share, largest * share, grid))


def _rounded(blocks: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None) -> _Found:
    values = grid.nearest(scaled_blocks(blocks, scale, zero))
    return _Found(values, scale.float(), zero, torch.full(scale.shape, torch.inf))


def _plain(blocks: Tensor, grid: Grid) -> _Found:
    best: _Found | None = None
    for found in _candidates(blocks, grid):
        found.error = (found.restored() - blocks).square().sum(dim=(1, 3))
        if best is None:
            best = found
        else:
            best.take(found)
    assert best is not None
    return best


def _with_inputs(blocks: Tensor, grid: Grid, second_moment: Tensor) -> _Found:
    below, height, beside, width = blocks.shape
    missing = beside * width - len(second_moment)
    moment = pad(second_moment, (0, missing, 0, missing))
    errors = torch.zeros(below * height, beside * width)
    best: list[_Found] = []
    for sweep in range(_SWEEPS if beside > 1 else 1):
        for place in range(beside):
            columns = slice(place * width, (place + 1) * width)
            errors[:, columns] = 0
            column = _Column(blocks[:, :, place : place + 1], moment[columns, columns], errors @ moment[:, columns])
            if sweep == 0:
                best.append(column.best(_candidates(column.blocks, grid)))
            else:
                best[place].error = column.cost(best[place])
                best[place] = column.best(iter((best[place], *_candidates(column.blocks, grid))))
            if grid.scale_dtype is not torch.float8_e8m0fnu:
                column.refit(best[place], grid)
            errors[:, columns] = (best[place].restored() - column.blocks).reshape(below * height, width)
    zeros = [found.zero for found in best if found.zero is not None]
    return _Found(
        torch.cat([found.values for found in best], dim=2),
        torch.cat([found.scale for found in best], dim=1),
        torch.cat(zeros, dim=1) if zeros else None,
        torch.cat([found.error for found in best], dim=1),
    )


class _Column:
    """Blocks below each other, which share their inputs.

    Args:
        moment: of their inputs, `[width, width]`.
        others: what the errors of the other inputs come to at these: `[rows, width]`.
    """

    def __init__(self, blocks: Tensor, moment: Tensor, others: Tensor) -> None:
        self.blocks = blocks  # [below, height, 1, width]
        self._moment = moment
        self._others = others.reshape(blocks.shape)

    def _met(self, values: Tensor) -> Tensor:
        """What values of the blocks' shape come to with each other's inputs."""
        return (values.view(-1, len(self._moment)) @ self._moment).view(values.shape)

    def cost(self, found: _Found) -> Tensor:
        """What the codes add to the squared output error, `[below, 1]`."""
        error = found.restored() - self.blocks
        return (self._met(error).add_(self._others, alpha=2).mul_(error)).sum(dim=(1, 3))

    def best(self, candidates: Iterator[_Found]) -> _Found:
        best = next(candidates)
        best.error = self.cost(best)
        for found in candidates:
            found.error = self.cost(found)
            best.take(found)
        return best

    def refit(self, best: _Found, grid: Grid) -> None:
        """Move scales to the least error for their codes, and round anew."""
        for _ in range(_REFITS):
            codes = best.values if best.zero is None else best.values - best.zero.float()[:, None, :, None]
            met = self._met(codes)
            size = (met * codes).sum(dim=(1, 3))
            wanted = ((met * self.blocks) - self._others * codes).sum(dim=(1, 3))
            scale = torch.where((size > 0) & (wanted > 0), wanted / size, best.scale)
            found = _rounded(self.blocks, grid, grid.stored_scale(scale), best.zero)
            found.error = self.cost(found)
            best.take(found)
