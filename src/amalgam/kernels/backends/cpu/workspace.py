"""What steps write to and read from beside the weights: buffers, logits, and the KV cache as the extension sees it.

In: tensors. Out: memory that one step after the other uses, of all programs. Must never know: weights, requests.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.kernels.backends.base import Tables
from amalgam.kernels.step import Cache, LayerCache, LayerState

if TYPE_CHECKING:
    from amalgam import _native

_ALIGNMENT = 64  # bytes, of every buffer


@dataclass(eq=False)
class Memory:
    """A KV cache, states, index keys and rotary tables as the extension sees them."""

    layers: tuple[LayerCache, ...]
    states: tuple[LayerState | None, ...]
    indexes: tuple[LayerCache | None, ...]
    block_size: int
    tables: Tables
    native: _native.StepMemory


class Workspace:
    """Grows to what the largest step needs. It is kept for the first step of a new version, which then finds it.

    Attributes:
        dtype: of activations.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.arena = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty((0, 0))
        self._expert_ids, self._gate_weights = torch.empty(0, dtype=torch.int64), torch.empty(0)
        # Of the tensors above: to ask a tensor takes 30 µs where nothing is in the caches.
        self._logits_shape = (0, 0)
        self._routing_shape = (0, 0, 0)
        self._memory: Memory | None = None

    def memory(self, kv: Cache, tables: Tables) -> Memory:
        """The cache as the extension sees it. It should be the same object in every step: another is looked at anew.

        Raises:
            ValueError: tensors of different lengths or types, or not dense.
        """
        known = self._memory
        if (
            known is None
            or known.layers is not kv.layers
            or known.states is not kv.states
            or known.indexes is not kv.indexes
            or known.block_size != kv.block_size
            or known.tables is not tables
        ):
            known = self._memory = self._look_at(kv, tables)
        return known

    def _look_at(self, kv: Cache, tables: Tables) -> Memory:
        from amalgam import _native

        memory = _native.StepMemory(
            [((keys, key_scales), (values, value_scales)) for keys, values, key_scales, value_scales in kv.layers],
            kv.block_size,
            list(tables),
            min((len(cos) for cos, _ in tables), default=sys.maxsize),
            kv.states,
            [None if index is None else (index.keys, index.key_scales) for index in kv.indexes],
        )
        return Memory(kv.layers, kv.states, kv.indexes, kv.block_size, tables, memory)

    def logits(self, shape: tuple[int, int]) -> Tensor:
        """float32, good until the next step."""
        if self._logits_shape != shape:
            self._logits, self._logits_shape = torch.empty(shape), shape
        return self._logits

    def routing(self, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Room for ids and gate weights, `[routes, tokens, k]`, good until the next step."""
        if self._routing_shape != shape:
            self._expert_ids, self._gate_weights = new_routing(shape)
            self._routing_shape = shape
        return self._expert_ids, self._gate_weights

    def place(self, buffers: Mapping[str, tuple[int, bool]], tokens: int) -> list[int]:
        """Lay buffers out in the arena for so many tokens; where in it they start. See `Program.buffers`."""
        starts, size = [], 0
        for width, is_wide in buffers.values():
            starts.append(size)
            nbytes = tokens * width * (4 if is_wide else self.dtype.itemsize)
            size += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if self.arena.nbytes < size + _ALIGNMENT:
            self.arena = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        base = -self.arena.data_ptr() % _ALIGNMENT
        return [base + start for start in starts]


def new_routing(shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Room for ids and gate weights that the caller keeps."""
    return torch.empty(shape, dtype=torch.int64), torch.empty(shape)
