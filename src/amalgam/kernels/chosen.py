"""Which positions the tokens of a step attend to where an indexer chooses them.

In: a step, the chosen positions. Out: an `AttentionBatch` over these positions only. Must never know: how they are
chosen, programs, weights.

A token at one of the first k positions of its sequence attends to all up to its own. Any other token becomes a
sequence of its own, whose keys are the chosen ones in the order of their positions. Blocks are of one slot then, so
that one batch holds both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.kernels.step import AttentionBatch, StepContext, StepSequence

MOST_SCORES = 2**22  # of a part, which has one for each of its tokens and positions


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the tokens that choose.

    Attributes:
        rows: int64 `[tokens]`, their rows in the step.
        sequences: int64 `[tokens]`, the step's sequence that each belongs to.
        batch: these tokens, over all positions up to their own.
    """

    rows: Tensor
    sequences: Tensor
    batch: AttentionBatch


class Choice:
    """The tokens of a step that have more than `k` positions to choose from; there is at least one."""

    def __init__(self, step: StepContext, k: int) -> None:
        self._step, self._k = step, k
        self.parts = list(self._in_parts())
        self._batch, self._choosing = self._lay_out()

    def attention(self, positions: Tensor) -> AttentionBatch:
        """All tokens of the step over the positions that they attend to.

        positions: int64 `[tokens, k]`, ascending, of the tokens of all parts in order.
        """
        sequences = torch.cat([part.sequences for part in self.parts])
        tables = self._batch.block_tables.clone()
        tables[self._choosing] = self._slots(sequences, positions)
        return AttentionBatch(self._batch.query_starts, self._batch.context_lengths, tables, 1)

    def _slots(self, sequences: Tensor, positions: Tensor) -> Tensor:
        """`[rows, n]`, where the cache has the positions `[rows, n]` of some sequences."""
        whole = self._step.attention
        blocks = whole.block_tables[sequences.unsqueeze(1), positions // whole.block_size]
        return blocks * whole.block_size + positions % whole.block_size

    def _in_parts(self) -> Iterator[Part]:
        whole = self._step.attention
        most_rows = max(1, MOST_SCORES // int(whole.context_lengths.max()))
        rows: list[int] = []
        found: list[tuple[int, int, int]] = []  # sequence, its tokens in this part, its positions up to their last
        start = 0

        def part() -> Part:
            index, counts, lengths = zip(*found, strict=True)
            device = whole.block_tables.device
            sequences, repeats = torch.tensor(index), torch.tensor(counts)
            batch = AttentionBatch(
                torch.cat((repeats.new_zeros(1), repeats.cumsum(0))),
                torch.tensor(lengths),
                whole.block_tables[sequences.to(device)],
                whole.block_size,
            )
            return Part(torch.tensor(rows, device=device), sequences.repeat_interleave(repeats).to(device), batch)

        for index, sequence in enumerate(self._step.sequences):
            first = sequence.first_position
            place, end = max(first, self._k), first + len(sequence.token_ids)
            while place < end:
                count = min(end - place, most_rows - len(rows))
                rows += range(start + place - first, start + place - first + count)
                found.append((index, count, place + count))
                place += count
                if len(rows) == most_rows:
                    yield part()
                    rows, found = [], []
            start += end - first
        if rows:
            yield part()

    def _lay_out(self) -> tuple[AttentionBatch, Tensor]:
        """All tokens over the first positions of their sequences, and which sequences of the batch choose others."""
        starts, lengths = [0], list[int]()
        choosing, sequences = list[int](), list[int]()
        for index, sequence in enumerate(self._step.sequences):
            first, count = sequence.first_position, len(sequence.token_ids)
            num_choosing = _num_choosing(sequence, self._k)
            if num_choosing < count:
                starts.append(starts[-1] + count - num_choosing)
                lengths.append(first + count - num_choosing)
                sequences.append(index)
            choosing += range(len(lengths), len(lengths) + num_choosing)
            starts += range(starts[-1] + 1, starts[-1] + 1 + num_choosing)
            lengths += [self._k] * num_choosing
            sequences += [index] * num_choosing
        whole = self._step.attention
        device = whole.block_tables.device
        positions = torch.arange(self._k, device=device).expand(len(sequences), -1)
        tables = self._slots(torch.tensor(sequences, device=device), positions)
        batch = AttentionBatch(torch.tensor(starts), torch.tensor(lengths), tables, 1)
        return batch, torch.tensor(choosing, device=device)


def chooses(step: StepContext, k: int) -> bool:
    """Whether any token of a step has more than k positions to attend to."""
    return any(_num_choosing(sequence, k) for sequence in step.sequences)


def _num_choosing(sequence: StepSequence, k: int) -> int:
    """How many of a sequence's tokens: those at position k and behind."""
    count = len(sequence.token_ids)
    return min(count, max(0, sequence.first_position + count - k))
