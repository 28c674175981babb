"""StepPlan → tensors → decoder → next tokens. Owns the KV cache.

In: a `StepPlan`. Out: a `StepResult`. Must never know: queues, text, threads.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.config import Settings
from amalgam.engine.memory import available_bytes
from amalgam.engine.request import StepPlan, StepResult
from amalgam.engine.sampler import sample
from amalgam.errors import ConfigError
from amalgam.models.context import AttentionBatch, KVCache, RoutingObserver, StepContext, TokenSpan
from amalgam.models.decoder import Decoder
from amalgam.models.spec import ModelSpec

_MEMORY_SHARE = 4  # without a setting the cache takes at most one part in four of the available memory


class Runner:
    """Runs steps on one device.

    Args:
        max_sequence_tokens: the longest sequence; the cache holds at least one of them.
        dtype: of the KV cache.

    Raises:
        ConfigError: the cache would be too small for one sequence.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: Settings,
        max_sequence_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        observer: RoutingObserver | None = None,
    ) -> None:
        self._decoder = decoder
        self._device = device
        self._observer = observer
        self._block_size = settings.engine.block_size
        self.num_blocks = choose_num_blocks(decoder.spec, settings, max_sequence_tokens, device, dtype)
        self._kv = KVCache.allocate(decoder.spec, self.num_blocks, self._block_size, dtype, device)

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the KV cache."""
        return sum(tensor.nbytes for tensor in (*self._kv.keys, *self._kv.values))

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a step: its keys and values go to the cache, its routing to the observer."""
        token_ids, context = self._build(plan)
        if self._observer is not None:
            for item in plan.scheduled:
                if item.request.num_recorded == 0:  # its first step
                    self._observer.count_request()
            self._observer.begin_step(token_spans(plan))
        hidden = self._decoder.forward(token_ids, context, plan.version)
        if self._observer is not None:
            self._observer.end_step()

        last_rows = context.attention.query_starts[1:] - 1
        sampled = [index for index, item in enumerate(plan.scheduled) if item.needs_sample]
        if not sampled:
            return StepResult({})
        logits = self._decoder.logits(hidden[last_rows[sampled].to(self._device)], plan.version)
        return sample(logits, [plan.scheduled[index].request for index in sampled])

    def _build(self, plan: StepPlan) -> tuple[Tensor, StepContext]:
        """Token ids and context of a step; rows are the requests' tokens, one request after the other."""
        items = plan.scheduled
        starts = np.array([item.start for item in items])
        counts = np.array([item.num_tokens for item in items])
        query_starts = np.concatenate(([0], np.cumsum(counts)))
        sequence_of_row = np.repeat(np.arange(len(items)), counts)
        positions = np.arange(query_starts[-1]) - np.repeat(query_starts[:-1] - starts, counts)

        num_blocks = np.array([len(item.block_ids) for item in items])
        block_tables = np.zeros((len(items), num_blocks.max()), dtype=np.int64)
        # Row-major order of a mask is the order of the concatenated block ids.
        is_used = np.arange(num_blocks.max()) < num_blocks[:, None]
        block_tables[is_used] = np.fromiter(chain.from_iterable(item.block_ids for item in items), dtype=np.int64)
        blocks = block_tables[sequence_of_row, positions // self._block_size]
        slot_ids = blocks * self._block_size + positions % self._block_size

        tokens = chain.from_iterable(item.request.token_ids[item.start : item.end] for item in items)
        attention = AttentionBatch(
            query_starts=torch.from_numpy(query_starts),
            context_lengths=torch.from_numpy(starts + counts),
            block_tables=self._to_device(block_tables),
            block_size=self._block_size,
        )
        context = StepContext(
            self._to_device(positions), self._to_device(slot_ids), attention, self._kv, self._observer
        )
        return self._to_device(np.fromiter(tokens, dtype=np.int64, count=len(positions))), context

    def _to_device(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def token_spans(plan: StepPlan) -> list[TokenSpan]:
    """Which rows of a step belong to which request, and which of them the statistics should count as what."""
    spans = []
    start = 0
    for item in plan.scheduled:
        stop = start + item.num_tokens
        num_prompt = min(max(item.request.num_prompt_tokens - item.start, 0), item.num_tokens)
        spans.append(TokenSpan(item.request.request_id, start, stop, stop - item.num_unrecorded, start + num_prompt))
        start = stop
    return spans


def choose_num_blocks(
    spec: ModelSpec, settings: Settings, max_sequence_tokens: int, device: torch.device, dtype: torch.dtype
) -> int:
    """How many KV blocks there are room for: `engine.kv_cache_bytes`, or what a full batch of full sequences takes.

    Raises:
        ConfigError: fewer than one sequence of `max_sequence_tokens` needs.
    """
    engine, inference = settings.engine, settings.inference
    block_bytes = KVCache.bytes_per_block(spec, engine.block_size, dtype)
    blocks_per_sequence = -(-max_sequence_tokens // engine.block_size)
    if engine.kv_cache_bytes is not None:
        allowed, origin = engine.kv_cache_bytes, "engine.kv_cache_bytes"
        num_blocks = allowed // block_bytes
    else:
        allowed, origin = available_bytes(device) // _MEMORY_SHARE, "a quarter of the available memory"
        num_blocks = min(inference.max_batch_size * blocks_per_sequence, allowed // block_bytes)
    if num_blocks < blocks_per_sequence:
        raise ConfigError(
            f"The KV cache of one sequence of {max_sequence_tokens} tokens takes {blocks_per_sequence * block_bytes} "
            f"bytes, and {origin} is {allowed}.",
            remedy="Raise engine.kv_cache_bytes or lower inference.max_seq_length.",
        )
    return num_blocks
