"""Memory that a model will need, before it is loaded.

In: settings. Out: `Estimate`: weights by precision, KV cache, workspace, this process without a model, and what the
machine has. Reads headers only.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.config.settings import Settings
from amalgam.engine.memory import STATES_PER_SEQUENCE, available_bytes, resident_bytes
from amalgam.errors import AmalgamError
from amalgam.formats.contract import WritableFormat
from amalgam.formats.registry import all_formats
from amalgam.kernels.chosen import MOST_SCORES
from amalgam.models.kv_cache import KVCache, kv_type
from amalgam.models.spec import ModelSpec
from amalgam.planning.cards import Card
from amalgam.runtime.device import choose_device
from amalgam.runtime.speculation import draft_bytes
from amalgam.text.files import has_tokenizer
from amalgam.text.tokenizer import Tokenizer
from amalgam.tools.estimate_devices import DeviceEstimate, devices_of

# Pages of libraries that are read only where something is computed, and what belongs to requests.
_ANSWERING_BYTES = 8 * 2**20
_ACCUMULATOR_BYTES = 4
# Of each score that an indexer gives: the score, a copy, a count and three marks. Of each position that it chooses: the
# position, its slot and two tables of those.
_SCORE_BYTES, _CHOICE_BYTES = 16, 32


@dataclass(frozen=True)
class UniformEstimate:
    """All linear weights in one format, everything else as it is."""

    format: str
    weights_bytes: int
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class Estimate:
    """Bytes, and what they allow.

    Attributes:
        weights: format → bytes in memory under the plan; bf16 as coded, which weights that were trained can be.
        mapped_bytes: those of them that are pages of the packed cache. The system keeps them in memory that nothing
            else needs and reads them again when they are touched, so that they need not fit and are not in the total.
        process_bytes: resident memory of this process, which has a tokenizer and no weights, and what it takes besides
            while it answers.
        workspace_bytes: activations of the largest step.
        kv_bytes_per_token: keys and values of one token over all layers.
        state_bytes: recurrent states of the sequences; 0: the model has none.
        draft_bytes: weights and KV cache of the draft that guesses tokens; 0: there is none.
        max_tokens_that_fit: sequences × length that the rest of the memory holds.
        num_parameters: of all weights.
        devices: what lies where; one, unless rules place experts elsewhere.
        has_tokenizer: whether `process_bytes` counts one; a checkpoint that is not whole has none.
    """

    seq_length: int
    batch_size: int
    weights: dict[str, int]
    weights_bytes: int
    mapped_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    state_bytes: int
    draft_bytes: int
    workspace_bytes: int
    process_bytes: int
    total_bytes: int
    available_bytes: int
    fits: bool
    max_tokens_that_fit: int
    uniform: tuple[UniformEstimate, ...]
    num_parameters: int
    devices: tuple[DeviceEstimate, ...]
    has_tokenizer: bool

    @property
    def rule_bytes(self) -> int:
        """What is said of any model in bfloat16: its weights, and a fifth of them for all else."""
        return round(2 * 1.2 * self.num_parameters)

    @property
    def bytes_per_parameter(self) -> float:
        return self.weights_bytes / self.num_parameters

    @property
    def share_beside_weights(self) -> float:
        """What all else takes, of the weights' bytes."""
        return (self.total_bytes + self.mapped_bytes - self.weights_bytes) / self.weights_bytes

    def as_json(self) -> dict[str, Any]:
        derived = {
            "rule_bytes": self.rule_bytes,
            "bytes_per_parameter": self.bytes_per_parameter,
            "share_beside_weights": self.share_beside_weights,
        }
        return {**asdict(self), **derived}


def estimate(
    settings: Settings, seq_length: int | None = None, batch_size: int | None = None, card: Card | None = None
) -> Estimate:
    """Memory for `batch_size` sequences of `seq_length` tokens; both from the settings if not given.

    Args:
        card: one to ask about that is not here, instead of the device that the settings name.

    Raises:
        AmalgamError: the plan cannot be fulfilled.
    """
    device = choose_device(settings.inference.device_map) if card is None else torch.device("cuda")
    dtype: torch.dtype = getattr(torch, settings.inference.dtype)
    loader = ModelLoader(settings.model, settings.inference, device, settings.engine.num_load_threads)
    planned = loader.plan()
    spec = loader.spec
    seq_length = seq_length or min(settings.inference.max_seq_length, spec.max_positions)
    batch_size = batch_size or settings.inference.max_batch_size

    weights: dict[str, int] = defaultdict(int)
    for weight in planned:
        weights[weight.format.name] += weight.memory_bytes
    per_block = KVCache.bytes_per_block(spec, settings.engine.block_size, kv_type(settings.engine.kv_dtype, dtype))
    blocks = batch_size * math.ceil(seq_length / settings.engine.block_size)
    workspace = workspace_bytes(spec, min(settings.engine.max_step_tokens, batch_size * seq_length), batch_size, dtype)
    knows_tokenizer = load_tokenizer(loader)
    process = resident_bytes() + _ANSWERING_BYTES if device.type == "cpu" else 0
    available = available_bytes(device) if card is None else card.memory_bytes
    mapped = sum(weight.memory_bytes for weight in planned if loader.maps(weight.format))
    states = batch_size * STATES_PER_SEQUENCE * spec.state_bytes
    draft = draft_bytes(settings, loader, blocks)
    kv_bytes = blocks * per_block
    devices = devices_of(loader, settings, planned, card, workspace + states + draft + kv_bytes)
    far = sum(each.total_bytes for each in devices[1:])
    fixed = sum(weights.values()) - mapped - far + workspace + states + draft
    # What this process holds already is not available any more, so it counts in the total but not against the rest.
    room = available - fixed
    return Estimate(
        seq_length=seq_length,
        batch_size=batch_size,
        weights=dict(weights),
        weights_bytes=sum(weights.values()),
        mapped_bytes=mapped,
        kv_bytes_per_token=per_block // settings.engine.block_size,
        kv_bytes=kv_bytes,
        state_bytes=states,
        draft_bytes=draft,
        workspace_bytes=workspace,
        process_bytes=process,
        total_bytes=fixed + far + kv_bytes + process,
        available_bytes=available,
        fits=fixed + kv_bytes <= available and not any(each.lacking_bytes > 0 for each in devices[1:]),
        max_tokens_that_fit=max(0, room // max(per_block, 1)) * settings.engine.block_size,
        num_parameters=sum(math.prod(weight.slot.shape) for weight in planned),
        uniform=tuple(_uniform(loader, planned, workspace + states + draft + kv_bytes, process, available)),
        devices=devices,
        has_tokenizer=knows_tokenizer,
    )


def load_tokenizer(loader: ModelLoader) -> bool:
    """Load the base's tokenizer, so that this process's memory, which counts, has the largest part of one without
    weights. False: there is none, as with a checkpoint of which only configuration and headers are at hand.

    Raises:
        CheckpointError: it is damaged.
    """
    folder, metadata = loader.base_folder, loader.base_metadata
    is_there = has_tokenizer(folder) or any(name.startswith("tokenizer.") for name in metadata or ())
    if is_there:
        Tokenizer.load(folder, metadata)
    return is_there


def workspace_bytes(spec: ModelSpec, step_tokens: int, batch_size: int, dtype: torch.dtype) -> int:
    """Activations of the largest step: residual, one block's inner values per token, what layers are given and share
    beside it, logits, an indexer's choice."""
    widths = [
        math.prod(slot.shape[:1])
        for slot in spec.slots
        if slot.role in {"attention", "linear_attention", "mlp", "shared_expert"}
    ]
    experts = [slot.shape[0] for slot in spec.slots if slot.role == "expert"]
    inner = max(widths, default=0) + max(experts, default=0) * max(1, spec.num_active_experts)
    per_token = (4 * spec.hidden_size + 2 * inner) * max(dtype.itemsize, _ACCUMULATOR_BYTES)
    per_token += spec.carried_width * dtype.itemsize
    logits = 2 * batch_size * spec.vocab_size * _ACCUMULATOR_BYTES
    choice = MOST_SCORES * _SCORE_BYTES + step_tokens * spec.num_chosen * _CHOICE_BYTES if spec.num_chosen else 0
    return step_tokens * per_token + logits + choice


def _uniform(
    loader: ModelLoader, planned: Sequence[PlannedWeight], others: int, process: int, available: int
) -> list[UniformEstimate]:
    """The same model with all linear weights but the head in one format, for each format that takes them."""
    is_kept = [not weight.slot.is_linear or weight.slot.role == "head" for weight in planned]
    kept = [weight for weight, keep in zip(planned, is_kept, strict=True) if keep]
    kept_bytes = sum(weight.memory_bytes for weight in kept)
    in_memory = sum(weight.memory_bytes for weight in kept if not loader.maps(weight.format)) + others
    slots = [weight.slot for weight, keep in zip(planned, is_kept, strict=True) if not keep]
    results = []
    for weight_format in all_formats():
        if not (weight_format.is_wide or isinstance(weight_format, WritableFormat)):
            continue
        try:
            size = sum(loader.memory_bytes(slot, weight_format) for slot in slots)
        except AmalgamError:  # a shape that the format cannot hold
            continue
        needed = in_memory + (0 if loader.maps(weight_format) else size)
        results.append(UniformEstimate(weight_format.name, kept_bytes + size, needed + process, needed <= available))
    return sorted(results, key=lambda result: -result.weights_bytes)
