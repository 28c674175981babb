"""StepPlan → sequences → decoder → new tokens. Owns the KV cache.

In: a `StepPlan`. Out: a `StepResult`. Must never know: queues, text, threads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amalgam.base.mapping import num_lost
from amalgam.config.settings import Settings
from amalgam.engine.memory import STATES_PER_SEQUENCE, available_bytes
from amalgam.engine.request import ScheduledRequest, StepPlan, StepResult
from amalgam.engine.sampler import sample
from amalgam.errors import ConfigError
from amalgam.kernels.backends.split.traffic import Traffic
from amalgam.kernels.step import SequenceState, StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache, kv_type
from amalgam.models.routing import RoutingObserver, TokenSpan
from amalgam.models.spec import ModelSpec
from amalgam.models.weights import WeightVersion

_MEMORY_SHARE = 4  # without a setting the cache takes at most one part in four of the available memory
_STATE_SHARE = 8  # and recurrent states one part in eight


class Runner:
    """Runs steps on one device.

    Args:
        max_sequence_tokens: the longest sequence; the cache holds at least one of them.
        dtype: of activations, and so of the KV cache unless `engine.kv_dtype` says otherwise.

    Raises:
        ConfigError: the cache would be too small for one sequence.

    Attributes:
        num_blocks: of the KV cache.
        num_states: slots for recurrent states; 0: the model has none.
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
        self._observer = observer
        self._sound: dict[int, int] = {}  # weight version → how many losses there were when its pages were all there
        self._block_size = settings.engine.block_size
        cache_type = kv_type(settings.engine.kv_dtype, dtype)
        self.num_blocks = choose_num_blocks(decoder.spec, settings, max_sequence_tokens, device, cache_type)
        self.num_states = choose_num_states(decoder.spec, settings, device)
        self._kv = KVCache.allocate(
            decoder.spec, self.num_blocks, self._block_size, cache_type, device, num_states=self.num_states
        )

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the KV cache."""
        return self._kv.nbytes

    @property
    def state_cache_bytes(self) -> int:
        """Size of the recurrent states' slots."""
        return self._kv.state_nbytes

    @property
    def observer(self) -> RoutingObserver | None:
        return self._observer

    @property
    def traffic(self) -> Mapping[str, Traffic]:
        """What went to each other device that experts lie on, and came back."""
        return self._decoder.traffic

    def prepare(self, version: WeightVersion) -> None:
        """Make a version ready to run, so that its first step takes no longer than others. In any thread."""
        self._decoder.prepare(version, self._kv)

    def kernels(self, version: WeightVersion) -> dict[str, str]:
        """Instruction of a step → what runs it."""
        return self._decoder.compile(version).describe()

    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a step: its keys and values go to the cache, its routing to the observer. In inference mode.

        The logits are the decoder's until its next step; nothing in the result refers to them.

        Raises:
            LostWeightsError: see `WeightVersion.check_mapped`; nothing of the step counts.
        """
        sequences: list[StepSequence] = []
        sampled: list[ScheduledRequest] = []
        has_readers = False
        for item in plan.scheduled:
            num_logits = item.num_logits
            state = None if item.state is None else SequenceState(*item.state)
            sequences.append(StepSequence(item.token_ids, item.start, item.block_ids, num_logits, state))
            has_readers = has_readers or item.request.reader is not None
            if num_logits:
                sampled.append(item)
                if item.request.constraint is not None:
                    item.request.constraint.prepare(item.proposed_ids)  # while the step computes
        if self._observer is not None:
            self._observer.begin_step(token_spans(plan))
        logits = self._decoder.forward(StepContext(sequences, self._kv, self._observer), plan.version)
        if lost := num_lost():
            self._check_mapped(plan.version, lost)
        result = sample(logits, sampled) if sampled else StepResult({}, {})
        if has_readers:
            self._read_prompts(plan)
        return result

    def _check_mapped(self, version: WeightVersion, lost: int) -> None:
        """Look at a version's files once after each loss: most are those of checkpoints that a re-map read."""
        if self._sound.get(version.version_id) != lost:
            version.check_mapped()
            self._sound[version.version_id] = lost

    def _read_prompts(self, plan: StepPlan) -> None:
        compiled = self._decoder.compile(plan.version)
        stop = 0
        for item in plan.scheduled:
            start, stop = stop, stop + item.num_tokens
            if item.request.reader is not None:
                item.request.reader.read(compiled.hidden()[start:stop], item.start, compiled.head)

    def commit(self, plan: StepPlan, rejected: Mapping[int, int]) -> None:
        """The step has succeeded: the observer counts it. To be called before the scheduler's `commit`.

        Args:
            rejected: as there.
        """
        if self._observer is None:
            return
        self._observer.end_step(rejected)
        for item in plan.scheduled:
            request = item.request
            if request.num_recorded == 0 and request.observation.is_counted:  # its first step
                self._observer.count_request(request.observation.label)


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

    Args:
        dtype: of the KV cache.

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
            remedy="Raise engine.kv_cache_bytes, lower inference.max_seq_length or choose a smaller engine.kv_dtype.",
        )
    return num_blocks


def choose_num_states(spec: ModelSpec, settings: Settings, device: torch.device) -> int:
    """How many slots for recurrent states: `engine.state_cache_bytes`, or two for each sequence of a full batch, one of
    them for a state that others can start from. 0: the model has none.

    Raises:
        ConfigError: there is no room for one.
    """
    if not spec.state_bytes:
        return 0
    allowed, origin = settings.engine.state_cache_bytes, "engine.state_cache_bytes"
    if allowed is None:
        allowed, origin = available_bytes(device) // _STATE_SHARE, "an eighth of the available memory"
        wanted = STATES_PER_SEQUENCE * settings.inference.max_batch_size * spec.state_bytes
        num_states = min(wanted, allowed) // spec.state_bytes
    else:
        num_states = allowed // spec.state_bytes
    if not num_states:
        raise ConfigError(
            f"The recurrent state of one sequence takes {spec.state_bytes} bytes, and {origin} is {allowed}.",
            remedy="Raise engine.state_cache_bytes.",
        )
    return num_states
