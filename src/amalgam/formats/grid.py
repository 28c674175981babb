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


@dataclass(frozen=True)
class QuantizeOptions:
    """What may be asked of a format's grid; None leaves the choice to the format."""

    group_size: int | None = None
    scale: str | None = None


@dataclass(frozen=True)
class Grid:
    """The values that a matrix can take in a format: `code × scale`, one scale for each block of it.

    Attributes:
        shape: `(out, in)` of the matrix.
        block: `(rows, columns)` that share a scale; blocks at the end may be smaller.
        strategy: what compressed-tensors calls the choice of blocks: tensor, channel, group or block.
        dtype: of a code: int8, or 8-bit floating point.
        low, high: the least and the largest code.
        reach: how many scales the largest magnitude of a block is, if nothing is clipped.
        scale_dtype: in which scales are stored.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    strategy: str
    dtype: torch.dtype
    low: float
    high: float
    reach: float
    scale_dtype: torch.dtype

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Blocks below and beside each other."""
        return num_blocks(self.shape, self.block)


@dataclass(frozen=True)
class Codes:
    """A quantized matrix, not yet in any layout.

    Attributes:
        values: `[out, in]` of the grid's type, from `low` to `high`.
        scale: `[blocks below each other, blocks beside each other]` of the grid's `scale_dtype`, above 0.
    """

    grid: Grid
    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Encoded:
    """A quantized matrix in its published layout: tensors by suffix, ready to be written or packed."""

    grid: Grid
    tensors: Mapping[str, Tensor]


def num_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks of a matrix stand below and beside each other."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])
