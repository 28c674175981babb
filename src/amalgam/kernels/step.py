"""What a step is about, as every backend sees it: its sequences, the KV cache, who watches the routing.

In: from the engine's runner. Out: nothing; these are nouns. Always an argument, never a global. Must never know:
families, weights, requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import NamedTuple, Protocol, Required, TypedDict

import torch
from torch import Tensor


class SequenceState(NamedTuple):
    """Where a step finds and leaves a sequence's recurrent state: slots of every `LayerState`.

    No slot is written for two sequences, nor written for one and read for another. A step that reads one slot and
    writes another can be taken back.

    Attributes:
        source: holds the state before the first of the step's tokens; None: there is none yet, all is 0.
        target: gets the state after the last one. May be the source.
        saves: (after how many of the step's tokens, the slot that gets the state there), in order.
    """

    source: int | None
    target: int
    saves: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, slot: int, first_position: int) -> SequenceState:
        """Of a sequence that keeps its state in one slot."""
        return cls(slot if first_position else None, slot)


class StepSequence(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        token_ids: one after another, the first of them at `first_position`.
        block_ids: the cache's blocks with its keys and values, from position 0 on.
        num_logits: of how many of the last tokens the logits are wanted.
        state: None: the model has no recurrent state.
    """

    token_ids: list[int]
    first_position: int
    block_ids: Sequence[int]
    num_logits: int
    state: SequenceState | None = None


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Which rows of a step belong to which sequence, and where each sequence's keys and values lie.

    Attributes:
        query_starts: int64 `[sequences + 1]` on the CPU; rows `[query_starts[s], query_starts[s + 1])` are sequence s.
        context_lengths: int64 `[sequences]` on the CPU; tokens with keys and values, this step's included.
        block_tables: int64 `[sequences, blocks]` on the KV cache's device; rows padded with any valid block id.
        block_size: tokens in one block.
    """

    query_starts: Tensor
    context_lengths: Tensor
    block_tables: Tensor
    block_size: int


class LayerCache(NamedTuple):
    """Keys and values of one layer, of one type.

    int8 and float8_e4m3fn hold codes: a value is its code times the scale of its slot and head. Other types hold the
    values themselves.

    Attributes:
        keys, values: `[slots, kv_heads, d]` and `[slots, kv_heads, v]`.
        key_scales, value_scales: float32 `[slots, kv_heads]`; None where there are no codes.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


class LayerState(NamedTuple):
    """What one layer knows of sequences beside keys and values: one slot for each, contiguous float32.

    Attributes:
        convolution: `[slots, n - 1, channels]`, the rows that the convolution of n rows saw last, the oldest first.
        recurrent: `[slots, value_heads, key_dim, value_dim]`; empty where there is a convolution only.
    """

    convolution: Tensor
    recurrent: Tensor


class AttentionOptions(TypedDict, total=False):
    """How scores become weights; what is left out is None.

    Attributes:
        scale: of the scores.
        window: how many positions a token sees, itself included; None: all before it.
        sinks: `[heads]`, logits that take part in the softmax without a value.
        chunk, softcap: see `Attend`.
    """

    scale: Required[float]
    window: int | None
    sinks: Tensor | None
    softcap: float | None
    chunk: int | None


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """What one layer's attention works with beside its queries, keys and values.

    Attributes:
        cache: the layer's.
        slot_ids: int64 `[tokens]`, where each token's key and value go.
        norms: weights `[d]` of the RMSNorm over every query head and every key head; None: no norm.
        rotary: cos and sin, float32 `[tokens, r / 2]`; None: no rotation.
        rounds_last, is_interleaved, norms_last: see `Attend`.
        scale, window, sinks, softcap, chunk: see `AttentionOptions`.
    """

    cache: LayerCache
    slot_ids: Tensor
    batch: AttentionBatch
    scale: float
    norms: tuple[Tensor, Tensor] | None = None
    norm_eps: float = 0.0
    rotary: tuple[Tensor, Tensor] | None = None
    window: int | None = None
    sinks: Tensor | None = None
    softcap: float | None = None
    rounds_last: bool = False
    is_interleaved: bool = False
    norms_last: bool = False
    chunk: int | None = None

    @property
    def options(self) -> AttentionOptions:
        return {
            "scale": self.scale,
            "window": self.window,
            "sinks": self.sinks,
            "softcap": self.softcap,
            "chunk": self.chunk,
        }


class Cache(Protocol):
    """Keys and values of all layers, with `num_blocks × block_size` slots each, and their recurrent states."""

    @property
    def layers(self) -> tuple[LayerCache, ...]: ...

    @property
    def states(self) -> tuple[LayerState | None, ...]:
        """Of each layer; None where it has none."""

    @property
    def indexes(self) -> tuple[LayerCache | None, ...]:
        """Of each layer, the keys of one head that its indexer finds tokens by, and no values; None: it has none."""

    @property
    def block_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...


class Observer(Protocol):
    """Sees which experts each token was routed to."""

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        """Routing of one layer: int64 and float `[tokens, top_k]`, perhaps on a GPU."""

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        """Routing of all layers that have experts, in order, instead of one by one: `[layers, tokens, top_k]`."""


class _StepTensors(NamedTuple):
    token_ids: Tensor
    positions: Tensor
    slot_ids: Tensor
    logit_rows: Tensor
    attention: AttentionBatch


@dataclass(frozen=True)
class StepContext:
    """One step.

    The rows of its tensors are one sequence's tokens after another's. They are made when somebody asks: the CPU backend
    takes the sequences as they are.

    Attributes:
        sequences: whose tokens the step runs, and where their keys and values lie in the cache.
        kv: the cache.
        observer: sees the routing, if anybody wants to.
    """

    sequences: Sequence[StepSequence]
    kv: Cache
    observer: Observer | None = None

    @property
    def token_ids(self) -> Tensor:
        """int64 `[tokens]`."""
        return self._tensors.token_ids

    @property
    def positions(self) -> Tensor:
        """int64 `[tokens]`, each token's place in its sequence."""
        return self._tensors.positions

    @property
    def slot_ids(self) -> Tensor:
        """int64 `[tokens]`, where each token's key and value go: `block_id × block_size + offset`."""
        return self._tensors.slot_ids

    @property
    def logit_rows(self) -> Tensor:
        """int64 `[rows]`: the rows whose logits are wanted, in order."""
        return self._tensors.logit_rows

    @property
    def attention(self) -> AttentionBatch:
        """Which rows belong to which sequence."""
        return self._tensors.attention

    @cached_property
    def _tensors(self) -> _StepTensors:
        """Plain lists and one tensor: a step of few tokens pays for the number of calls, not for the elements."""
        block_size = self.kv.block_size
        width = max((len(sequence.block_ids) for sequence in self.sequences), default=0)
        token_ids: list[int] = []
        positions: list[int] = []
        slot_ids: list[int] = []
        logit_rows: list[int] = []
        tables: list[int] = []
        query_starts, context_lengths = [0], []
        for new_ids, first, block_ids, num_logits, _ in self.sequences:
            places = range(first, first + len(new_ids))
            token_ids += new_ids
            positions += places
            for place in places:
                slot_ids.append(block_ids[place // block_size] * block_size + place % block_size)
            logit_rows += range(len(token_ids) - min(num_logits, len(new_ids)), len(token_ids))
            tables += block_ids
            tables += [0] * (width - len(block_ids))
            query_starts.append(len(token_ids))
            context_lengths.append(places.stop)
        parts = (token_ids, positions, slot_ids, logit_rows, tables, query_starts, context_lengths)
        sizes = [len(part) for part in parts]
        together = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)
        on_device = together.to(self.kv.device)
        token_rows, positions_, slots, wanted, table, _, _ = on_device.split(sizes)
        *_, starts, lengths = together.split(sizes)
        batch = AttentionBatch(starts, lengths, table.view(len(context_lengths), width), block_size)
        return _StepTensors(token_rows, positions_, slots, wanted, batch)
