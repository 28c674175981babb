"""The rows of a batch in tiles, each a few queries that follow one another in one sequence.

In: an `AttentionBatch`. Out: `Tiles`, on the device. Must never know: heads, the cache, who multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from amalgam.kernels.step import AttentionBatch

# A sequence with more tokens in a step is a prompt. As many as this are a stream's, with tokens guessed ahead.
MOST_SINGLE = 8
# Tiles of a launch whose keys are divided: each division leaves a result, for each of its splits and heads.
MOST_TILES = 128


@dataclass(frozen=True, eq=False)
class TokenBatch(AttentionBatch):
    """A batch whose every row is a tile of its own, described on the device alone; the CPU's tensors are empty.

    Attributes:
        tiles: int64 `[4, rows]`: see `Tiles`.
    """

    tiles: Tensor


class Tiles:
    """The tiles of a batch, int64 `[4, tiles]` each: first row, its position, number of rows, row of the block table.

    Attributes:
        single: of one row each, `MOST_TILES` at most in a tensor.
    """

    def __init__(self, batch: AttentionBatch) -> None:
        self._device = batch.block_tables.device
        self._prompts: list[tuple[int, int, int, int]] = []  # first row, its position, the last one's + 1, table row
        self._cut: dict[int, Tensor] = {}
        single = batch.tiles if isinstance(batch, TokenBatch) else self._divide(batch)
        self.single = tuple(part.contiguous() for part in single.split(MOST_TILES, dim=1) if part.shape[1])

    def _divide(self, batch: AttentionBatch) -> Tensor:
        """Take down the prompts; the tiles of the other sequences."""
        starts, contexts = batch.query_starts, batch.context_lengths
        counts = starts.diff()
        is_single = counts <= MOST_SINGLE
        index = torch.arange(len(counts))
        for one in index[~is_single].tolist():
            end = int(contexts[one])
            self._prompts.append((int(starts[one]), end - int(counts[one]), end, one))
        lengths = counts[is_single]
        table = index[is_single].repeat_interleave(lengths)
        within = torch.arange(len(table)) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        positions = contexts[table] - counts[table] + within
        return torch.stack((starts[table] + within, positions, torch.ones_like(table), table)).to(self._device)

    def prompts(self, length: int) -> tuple[Tensor, ...]:
        """Tiles of up to so many rows, of the sequences with more than `MOST_SINGLE` rows, in one tensor if any."""
        if not self._prompts:
            return ()
        if length not in self._cut:
            parts = []
            for row, first, end, table in self._prompts:
                starts = torch.arange(first // length * length, end, length)
                begins, ends = starts.clamp(min=first), (starts + length).clamp(max=end)
                parts.append(torch.stack((row + begins - first, begins, ends - begins, torch.full_like(begins, table))))
            # The longest first: the last to begin should not be the last to end.
            self._cut[length] = torch.cat(parts, dim=1).flip(1).contiguous().to(self._device)
        return (self._cut[length],)


# Made by the first layer of a step that attends.
_TILES: WeakKeyDictionary[AttentionBatch, Tiles] = WeakKeyDictionary()


def tiles_of(batch: AttentionBatch) -> Tiles:
    """A batch's tiles, made once; one copy to the device for each length."""
    found = _TILES.get(batch)
    if found is None:
        found = _TILES[batch] = Tiles(batch)
    return found
