"""What a step hands to the decoder besides weights: its sequences, the KV cache, the observer of routing.

In: from the engine's runner. Out: nothing; these are nouns. Always an argument, never a global.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.kernels.step import Observer, StepContext, StepSequence

if TYPE_CHECKING:
    from amalgam.models.spec import ModelSpec

__all__ = [
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


class RoutingObserver(Observer, Protocol):
    """Sees which experts each token was routed to, and whose tokens they were.

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
