"""What one step has computed so far."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from amalgam.kernels.backends.base import Tables
from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.chosen import Choice, chooses
from amalgam.kernels.program import Instruction, Rows
from amalgam.kernels.step import AttentionBatch, StepContext


class Frame:
    """What one step has computed so far: activations by buffer, the last routing and choice, the logits.

    Attributes:
        chosen: the step's tokens over the positions that an indexer chose for them; None: over all.
    """

    def __init__(
        self, step: StepContext, dtype: torch.dtype, tables: Tables, operators: type[Operators] = Operators
    ) -> None:
        self.step = step
        self.dtype = dtype
        self.operators = operators
        self.routing: tuple[Tensor, Tensor] | None = None
        self.chosen: AttentionBatch | None = None
        self.logits: Tensor | None = None
        self._tables = tables
        self._rotary: dict[int, tuple[Tensor, Tensor]] = {}
        self._buffers: dict[str, Tensor] = {}
        self._choices: dict[int, Choice | None] = {}

    def get(self, rows: Rows) -> Tensor:
        """`[tokens, width]`, perhaps a view."""
        return self._buffers[rows.buffer][:, rows.start : rows.start + rows.width]

    def put(self, rows: Rows, value: Tensor) -> None:
        assert value.shape[1] == rows.width, (rows, value.shape)
        if rows.is_whole:
            self._buffers[rows.buffer] = value
            return
        buffer = self._buffers.get(rows.buffer)
        if buffer is None or buffer.shape != (len(value), rows.stride):
            buffer = self._buffers[rows.buffer] = value.new_empty((len(value), rows.stride))
        buffer[:, rows.start : rows.start + rows.width] = value

    def whole(self, buffers: Collection[str]) -> dict[str, Tensor]:
        """Those of the buffers that hold something."""
        return {name: self._buffers[name] for name in buffers if name in self._buffers}

    def forget(self, buffer: str) -> None:
        """Give up the memory of a buffer that nothing reads any more."""
        self._buffers.pop(buffer, None)

    def rotary(self, rope: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the step's positions."""
        if rope not in self._rotary:
            cos, sin = self._tables[rope]
            self._rotary[rope] = cos[self.step.positions], sin[self.step.positions]
        return self._rotary[rope]

    def choice(self, k: int) -> Choice | None:
        """The step's tokens that have more than k positions to choose from; None if there are none."""
        if k not in self._choices:
            self._choices[k] = Choice(self.step, k) if chooses(self.step, k) else None
        return self._choices[k]

    def route(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        self.routing = expert_ids, gate_weights
        if self.step.observer is not None:
            self.step.observer.observe(layer_id, expert_ids, gate_weights)


# Called before an instruction runs; `frame.get(instruction.x)` is its input, and the routing stands in the frame.
Watch = Callable[[Instruction, Frame], None]
