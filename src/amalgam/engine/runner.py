"""StepPlan → tensors → decoder → next tokens. Owns the KV cache.

In: a `StepPlan`. Out: a `StepResult`. Must never know: queues, text, threads.
"""

from __future__ import annotations

from itertools import chain

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

    @property
    def observer(self) -> RoutingObserver | None:
        return self._observer

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a step: its keys and values go to the cache, its routing to the observer."""
        token_ids, last_rows, context = self._build(plan)
        if self._observer is not None:
            self._observer.begin_step(token_spans(plan))
        hidden = self._decoder.forward(token_ids, context, plan.version)
        if self._observer is not None:
            self._observer.end_step()
            for item in plan.scheduled:  # not before: a step that fails counts nothing
                request = item.request
                if request.num_recorded == 0 and request.observation.is_counted:  # its first step
                    self._observer.count_request(request.observation.label)

        sampled = [item.request for item in plan.scheduled if item.needs_sample]
        if not sampled:
            return StepResult({})
        if len(sampled) < len(hidden):  # otherwise every request has one row, its last
            hidden = hidden.index_select(0, last_rows)
        return sample(self._decoder.logits(hidden, plan.version), sampled)

    def _build(self, plan: StepPlan) -> tuple[Tensor, Tensor, StepContext]:
        """Token ids, the rows whose logits are wanted, and the context; rows are one request's tokens after another's.

        Plain lists and one tensor: a step of few tokens pays for the number of calls, not for the elements.
        """
        items, block_size = plan.scheduled, self._block_size
        width = max(len(item.block_ids) for item in items)
        token_ids: list[int] = []
        positions: list[int] = []
        slot_ids: list[int] = []
        tables: list[int] = []
        query_starts, last_rows = [0], []
        for item in items:
            block_ids, places = item.block_ids, range(item.start, item.end)
            token_ids += item.request.token_ids[item.start : item.end]
            positions += places
            for place in places:
                slot_ids.append(block_ids[place // block_size] * block_size + place % block_size)
            tables += block_ids
            tables += [0] * (width - len(block_ids))
            query_starts.append(len(token_ids))
            if item.needs_sample:
                last_rows.append(len(token_ids) - 1)
        context_lengths = [item.end for item in items]
        parts = (token_ids, positions, slot_ids, last_rows, tables, query_starts, context_lengths)
        sizes = [len(part) for part in parts]
        together = torch.tensor(list(chain.from_iterable(parts)), dtype=torch.int64)
        tokens, places_, slots, last, table, _, _ = together.to(self._device).split(sizes)
        *_, starts, lengths = together.split(sizes)
        batch = AttentionBatch(starts, lengths, table.view(len(items), width), block_size)
        return tokens, last, StepContext(places_, slots, batch, self._kv, self._observer)


def token_spans(plan: StepPlan) -> list[TokenSpan]:
    """Which rows of a step belong to which request, and which of them the statistics should count as what."""
    spans = []
    start = 0
    for item in plan.scheduled:
        stop = start + item.num_tokens
        num_prompt = min(max(item.request.num_prompt_tokens - item.start, 0), item.num_tokens)
        observation = item.request.observation
        spans.append(
            TokenSpan(
                item.request.request_id,
                start,
                stop,
                record_from=stop - item.num_unrecorded,
                generated_from=start + num_prompt,
                label=observation.label,
                position=item.start,
                is_counted=observation.is_counted,
                wants_trace=observation.wants_trace,
            )
        )
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
