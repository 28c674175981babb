"""What a step hands to the decoder besides tokens and weights: positions, the KV cache, the observer of routing.

In: from the engine's runner. Out: nothing; these are nouns. Always an argument, never a global.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.kernels.packed import AttentionBatch
from amalgam.kernels.stack import StepSequence

if TYPE_CHECKING:
    from amalgam.models.rope import Rope
    from amalgam.models.spec import ModelSpec

__all__ = [
    "AttentionBatch",
    "BlockContext",
    "KVCache",
    "RoutingObserver",
    "RoutingTrace",
    "StepContext",
    "StepSequence",
    "TokenSpan",
]


class TokenSpan(NamedTuple):
    """One request's rows in a step: `[start, stop)`.

    Rows before `record_from` were recorded in an earlier step (a preempted request is computed again); rows from
    `generated_from` on are generated tokens, those before it prompt tokens. Both are clamped to `[start, stop]`.

    Attributes:
        label: what the client calls this kind of request, if anything.
        position: place of row `start` in its sequence.
        is_counted: whether the statistics take these rows.
        wants_trace: whether the request wants to know its own routing.
    """

    request_id: int
    start: int
    stop: int
    record_from: int
    generated_from: int
    label: str | None = None
    position: int = 0
    is_counted: bool = True
    wants_trace: bool = False


@dataclass(frozen=True)
class RoutingTrace:
    """Which experts each token of one request was routed to, in order of the tokens.

    The last token of an answer is never fed back and has no row. Rows of tokens that were not computed for this
    request (their keys and values were there already) hold -1 and weight 0.
    """

    layer_ids: tuple[int, ...]
    expert_ids: npt.NDArray[np.int16]  # [tokens, layers, k], the heaviest first
    gate_weights: npt.NDArray[np.float32]  # [tokens, layers, k]


class RoutingObserver(Protocol):
    """Sees which experts each token was routed to.

    From `begin_step` to `end_step`, and `count_request`, are called in the step thread only, the rest in any.
    """

    def admit(self, request_id: int, label: str | None, num_traced_tokens: int) -> None:
        """A request that has a label, or wants a trace of at most so many tokens, is about to be queued.

        Raises:
            RequestError: the label is one too many, or the trace too long to be kept.
            OverloadedError: other requests' traces take the memory that there is.
        """

    def begin_step(self, spans: Sequence[TokenSpan]) -> None:
        """A step starts; its rows belong to these requests."""

    def observe(self, layer_id: int, expert_ids: Tensor, gate_weights: Tensor) -> None:
        """Routing of one layer: int64 and float `[tokens, top_k]`, perhaps on a GPU."""

    def observe_all(self, expert_ids: Tensor, gate_weights: Tensor) -> None:
        """Routing of all layers that have experts, in order, instead of one by one: `[layers, tokens, top_k]`."""

    def end_step(self, rejected: Mapping[int, int] | None = None) -> None:
        """The step succeeded. A step without this call did not happen.

        Args:
            rejected: request id → how many rows at the end of its span were proposals that did not come true.
        """

    def count_request(self, label: str | None) -> None:
        """A request had its first step."""

    def take_trace(self, request_id: int) -> RoutingTrace | None:
        """The trace of a request that has ended, which is then forgotten; None if it kept none."""

    def close(self) -> None:
        """No step follows."""


class KVCache:
    """Keys and values of all layers, as slots `[num_blocks × block_size, kv_heads, dim]`."""

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], block_size: int) -> None:
        self.keys = tuple(keys)
        self.values = tuple(values)
        self.block_size = block_size

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @classmethod
    def allocate(
        cls, spec: ModelSpec, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> KVCache:
        """Zeroed storage; on the CPU, pages cost no memory until they are used."""
        slots = num_blocks * block_size

        def zeros(heads: int, dim: int) -> Tensor:
            if device.type != "cpu" or not heads * dim:
                return torch.zeros((slots, heads, dim), dtype=dtype, device=device)
            # torch.zeros writes every page; numpy asks the system for pages that are zero already.
            raw = np.zeros(slots * heads * dim * dtype.itemsize, dtype=np.uint8)
            return torch.from_numpy(raw).view(dtype).view(slots, heads, dim)

        keys = [zeros(heads, key_dim) for heads, key_dim, _ in spec.kv_shapes]
        values = [zeros(heads, value_dim) for heads, _, value_dim in spec.kv_shapes]
        return cls(keys, values, block_size)

    @staticmethod
    def bytes_per_block(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return sum(heads * (key + value) for heads, key, value in spec.kv_shapes) * block_size * dtype.itemsize


class _StepTensors(NamedTuple):
    token_ids: Tensor
    positions: Tensor
    slot_ids: Tensor
    logit_rows: Tensor
    attention: AttentionBatch


@dataclass(frozen=True)
class StepContext:
    """One step as the decoder sees it.

    The rows of its tensors are one sequence's tokens after another's. They are made when somebody asks: the extension,
    which runs a whole step, takes the sequences as they are.

    Attributes:
        sequences: whose tokens the step runs, and where their keys and values lie in the cache.
        kv: the cache.
        observer: sees the routing, if anybody wants to.
    """

    sequences: Sequence[StepSequence]
    kv: KVCache
    observer: RoutingObserver | None = None

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
        for new_ids, first, block_ids, num_logits in self.sequences:
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


@dataclass(frozen=True)
class BlockContext:
    """A step as one layer's blocks see it: the step, the layer, and cos and sin of the step's positions by rope."""

    step: StepContext
    layer_id: int
    rotary: Mapping[Rope, tuple[Tensor, Tensor]]
