"""Steps as they were observed → rows to count.

In: the routing of some steps, on any device. Out: `Rows` in main memory. Must never know what is made of them.

Steps are kept and read out together: one transfer for many, and no waiting for the device after each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.experts.history import GENERATED, NUM_PHASES, PROMPT, Tally

if TYPE_CHECKING:
    from amalgam.models.routing import TokenSpan

_UNCOUNTED = NUM_PHASES  # the phase of rows that were recorded before, or belong to nobody


class Step(NamedTuple):
    """One step that succeeded. The tensors are the step's own: nobody writes to them any more."""

    timestamp: float
    spans: Sequence[TokenSpan]
    num_rows: int
    expert_ids: Tensor  # [layers, rows, k]
    gate_weights: Tensor  # [layers, rows, k]


@dataclass(frozen=True)
class Rows:
    """The rows of some steps, one after the other."""

    expert_ids: npt.NDArray[np.int16]  # [layers, rows, k]
    gate_weights: npt.NDArray[np.float32]  # [layers, rows, k]
    phases: npt.NDArray[np.int64]  # [rows]
    num_experts: int

    @classmethod
    @torch.inference_mode()
    def read(cls, steps: Sequence[Step], num_experts: int) -> Rows:
        """Read steps back from their device."""
        phases = np.concatenate([row_phases(step.spans, step.num_rows) for step in steps])
        return cls(
            torch.cat([step.expert_ids for step in steps], dim=1).to(torch.int16).cpu().numpy(),
            torch.cat([step.gate_weights for step in steps], dim=1).float().cpu().numpy(),
            phases,
            num_experts,
        )

    def __getitem__(self, index: npt.NDArray[np.bool_ | np.intp] | slice) -> Rows:
        """Some of the rows."""
        return Rows(self.expert_ids[:, index], self.gate_weights[:, index], self.phases[index], self.num_experts)

    def __len__(self) -> int:
        return len(self.phases)

    @cached_property
    def is_counted(self) -> npt.NDArray[np.bool_]:
        """Which rows are to be counted, [rows]."""
        return np.asarray(self.phases != _UNCOUNTED)

    @property
    def counted(self) -> Rows:
        """Only those."""
        return self if self.is_counted.all() else self[self.is_counted]

    @cached_property
    def cells(self) -> npt.NDArray[np.int64]:
        """`[layers, rows, k]`, each activation's index in the flattened grid [layers, experts]."""
        num_layers = len(self.expert_ids)
        offsets = np.arange(0, num_layers * self.num_experts, max(self.num_experts, 1), dtype=np.int64)
        return self.expert_ids + offsets[:num_layers, None, None]

    def distinct_experts(self, starts: Sequence[int]) -> npt.NDArray[np.float64]:
        """`[steps]`: how many experts of a layer some row was routed to, counted or not, on the mean over the layers.

        Args:
            starts: where each step's rows begin, and where the last one's end.
        """
        num_steps, num_layers = len(starts) - 1, len(self.expert_ids)
        is_used = np.zeros((num_steps, num_layers * self.num_experts), np.bool_)
        is_used[np.repeat(np.arange(num_steps), np.diff(starts))[None, :, None], self.cells] = True
        return np.asarray(is_used.sum(axis=1) / max(num_layers, 1))

    @property
    def phased_cells(self) -> npt.NDArray[np.int64]:
        """The same in the flattened grid [phases, layers, experts], as one list."""
        num_cells = len(self.expert_ids) * self.num_experts
        return (self.cells + (self.phases * num_cells)[:, None]).reshape(-1)

    @property
    def num_tokens(self) -> npt.NDArray[np.int64]:
        """Rows of each phase."""
        return np.bincount(self.phases, minlength=NUM_PHASES)[:NUM_PHASES]

    def tally(self) -> Tally:
        """Add up rows that are all counted."""
        shape = (NUM_PHASES, len(self.expert_ids), self.num_experts)
        size, cells = int(np.prod(shape)), self.phased_cells
        if not size:
            return Tally(np.zeros(shape, np.int64), np.zeros(shape), self.num_tokens, np.zeros((), np.int64))
        counts = np.bincount(cells, minlength=size).reshape(shape)
        mass = np.bincount(cells, self.gate_weights.reshape(-1), size).astype(np.float64, copy=False)
        return Tally(counts, mass.reshape(shape), self.num_tokens, np.zeros((), np.int64))

    def add_to(self, tally: Tally) -> None:
        """Add these rows to a tally in place; cheaper than `tally` for few rows in a large grid."""
        cells = self.phased_cells
        np.add.at(tally.counts.reshape(-1), cells, 1)
        np.add.at(tally.gate_mass.reshape(-1), cells, self.gate_weights.reshape(-1).astype(np.float64))
        np.add(tally.num_tokens, self.num_tokens, out=tally.num_tokens)


def row_phases(spans: Sequence[TokenSpan], num_rows: int) -> npt.NDArray[np.int64]:
    """The phase of each row of a step, [tokens]; rows recorded before, and rows of no span, are uncounted."""
    phases = bytearray([_UNCOUNTED]) * num_rows  # for spans of a row each, several times faster than an array
    for span in spans:
        if not span.is_counted:
            continue
        first = max(span.start, span.record_from)
        turn = min(max(first, span.generated_from), span.stop)
        if first < turn:
            phases[first:turn] = bytes([PROMPT]) * (turn - first)
        if turn < span.stop:
            phases[turn : span.stop] = bytes([GENERATED]) * (span.stop - turn)
    return np.frombuffer(phases, np.uint8).astype(np.int64)
