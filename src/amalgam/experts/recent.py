"""The latest activations: which experts the last steps used, in bounded memory.

In: rows and the steps they belong to. Out: `RecentActivation`s. Not locked: `ExpertTracker` calls it under its own
lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amalgam.experts.history import GENERATED, NUM_PHASES, PROMPT
from amalgam.experts.recording import Rows, Step


@dataclass(frozen=True)
class RecentActivation:
    """One expert's use in one step."""

    timestamp: float
    layer_id: int
    expert_id: int
    num_prompt_tokens: int
    num_generated_tokens: int


@dataclass(frozen=True)
class StepRecord:
    """The last cells that one step used, compact: `cells` are indices into the flattened [layers, experts] grid."""

    timestamp: float
    cells: npt.NDArray[np.int64]  # [n]
    counts: npt.NDArray[np.integer]  # [phases, n]


class RecentActivations:
    """Of the last steps, as many as it takes for `limit` activations."""

    def __init__(self, layer_ids: Sequence[int], num_experts: int, limit: int) -> None:
        self._layer_ids = tuple(layer_ids)
        self._num_experts = num_experts
        self._limit = limit
        self._records: deque[StepRecord] = deque()
        self._num_recorded = 0

    def add(self, steps: Sequence[Step], rows: Rows, starts: Sequence[int]) -> None:
        """Add steps, whose rows begin at `starts`, to which the end of the last one is added; of older ones keep only
        those that are needed to fill the list."""
        num_cells = len(self._layer_ids) * self._num_experts
        added: list[StepRecord] = []
        num_missing = self._limit
        for step, first, stop in reversed(list(zip(steps, starts[:-1], starts[1:], strict=True))):
            if num_missing <= 0:
                break
            of_step = rows[slice(first, stop)].counted
            counts = np.bincount(of_step.phased_cells, minlength=NUM_PHASES * num_cells).reshape(NUM_PHASES, num_cells)
            cells = np.flatnonzero(counts[PROMPT] + counts[GENERATED])[-self._limit :]
            if len(cells):
                added.append(StepRecord(step.timestamp, cells, counts[:, cells]))
                num_missing -= len(cells)
        for record in reversed(added):
            self._records.append(record)
            self._num_recorded += len(record.cells)
        while self._records and self._num_recorded - len(self._records[0].cells) >= self._limit:
            self._num_recorded -= len(self._records.popleft().cells)

    def records(self) -> list[StepRecord]:
        """What is kept, oldest first; records never change."""
        return list(self._records)

    def expand(self, records: Iterable[StepRecord], shift: float) -> tuple[RecentActivation, ...]:
        """The last activations of some records, `shift` seconds later. Needs no lock."""
        expanded = []
        for record in records:
            for cell, num_prompt, num_generated in zip(record.cells.tolist(), *record.counts.tolist(), strict=True):
                row, expert_id = divmod(cell, self._num_experts)
                layer_id, moment = self._layer_ids[row], record.timestamp + shift
                expanded.append(RecentActivation(moment, layer_id, expert_id, num_prompt, num_generated))
        return tuple(expanded[max(0, len(expanded) - self._limit) :])

    def clear(self) -> None:
        self._records.clear()
        self._num_recorded = 0

    @property
    def nbytes(self) -> int:
        return sum(record.cells.nbytes + record.counts.nbytes for record in self._records)
