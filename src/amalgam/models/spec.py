"""What a model is: sizes and block choices, and what a family has to say to make them of a config.json.

In: a Hugging Face `config.json`. Out: a `ModelSpec`, a `Family`.
Must never know: checkpoints' files, precisions, requests, which families there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from amalgam.base.fields import Fields
from amalgam.formats.fused import FusedTensor
from amalgam.kernels.program import Emitter, Rows
from amalgam.models.rope import Rope
from amalgam.models.weights import BlockWeights

T = TypeVar("T")

DRAFT_LAYERS = "layers that predict further tokens"  # as `Family.left_out` and reports call them


@dataclass(frozen=True)
class Slot:
    """A weight's place in the decoder.

    Attributes:
        name: `layers.3.attention.q`, unique in the model.
        shape: logical shape, `(out, in)` for a linear weight.
        role: embedding, head, norm, bias, router, convolution, indexer, attention, linear_attention, mlp, expert or
            shared_expert.
        is_transposed: unquantized checkpoints store the weight as `(in, out)` (GPT-2's `Conv1D`).
    """

    name: str
    shape: tuple[int, ...]
    role: str
    is_transposed: bool = False

    @property
    def is_linear(self) -> bool:
        """Whether the weight multiplies activations and may be quantized."""
        return self.role in {"attention", "linear_attention", "mlp", "expert", "shared_expert", "head"}

    @property
    def decides(self) -> bool:
        """Whether the weight multiplies activations to choose by what comes out: it is never quantized here."""
        return self.role in {"router", "indexer"}


class Norm(Protocol):
    """A norm over the hidden size: a frozen dataclass, like a block."""

    def slots(self, name: str, width: int) -> Iterator[Slot]: ...

    def emit(
        self, step: Emitter, x: Rows, out: Rows, weights: BlockWeights, name: str, delta: Rows | None = None
    ) -> None:
        """out = norm(x); with a `delta`, x += delta before."""


class Block(Protocol):
    """An attention or MLP block: its sizes, its slots (relative to its own prefix) and its instructions.

    A frozen dataclass, so that the specs of two checkpoints can be compared.
    """

    def slots(self, hidden_size: int) -> Iterator[Slot]: ...

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        """Add what computes the block from the normed rows `x`; returns where its result will be."""


class StateShape(NamedTuple):
    """Sizes of one sequence's recurrent state in one layer; see `LayerState`. Zeros where it is a convolution only."""

    convolution: tuple[int, int]
    recurrent: tuple[int, int, int]

    @property
    def nbytes(self) -> int:
        return 4 * (math.prod(self.convolution) + math.prod(self.recurrent))


class AttentionBlock(Block, Protocol):
    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(kv_heads, key_dim, value_dim) of one token in the cache; zeros: it keeps none."""

    @property
    def state_shape(self) -> StateShape | None:
        """Of its recurrent state; None: it has none."""

    @property
    def rope(self) -> Rope | None: ...


class LayerInputs(Protocol):
    """What each layer is given of the tokens themselves, beside the stream: a frozen dataclass, like a block.

    Its slots of all layers together stand outside of the layers, those of a layer under `layers.{}.inputs`.
    """

    @property
    def buffer(self) -> str:
        """Where the inputs of all layers are."""

    @property
    def width(self) -> int:
        """Of a token's inputs for all layers."""

    def slots(self, hidden_size: int) -> Iterator[Slot]: ...

    def layer_slots(self, hidden_size: int) -> Iterator[Slot]: ...

    def emit_start(self, step: Emitter, x: Rows, weights: BlockWeights) -> None:
        """Add what computes the inputs of all layers from the token ids and the embedded rows `x`."""

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        """Add what a layer makes of its input and of `x`, behind its blocks; returns what is to be added to `x`."""


class MlpBlock(Block, Protocol):
    @property
    def num_experts(self) -> int:
        """0 for a dense MLP."""

    @property
    def num_active_experts(self) -> int: ...


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer."""

    attention: AttentionBlock
    mlp: MlpBlock


class Norms(Enum):
    """Where a layer's norms are: before each of its blocks, on what each of them adds to the stream, or both."""

    BEFORE = "before"
    BEHIND = "behind"
    AROUND = "around"

    @property
    def is_before(self) -> bool:
        return self is not Norms.BEHIND

    @property
    def is_behind(self) -> bool:
        return self is not Norms.BEFORE


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and block choices of a whole decoder.

    Attributes:
        max_positions: the longest sequence that the checkpoint declares.
        norm: of the blocks, and after the last one.
        has_position_embedding: positions are learned vectors, added to the embedding (GPT-2).
        num_draft_layers: layers behind the last one that predict further tokens; checkpoints may hold them, the
            decoder has no use for them.
        norms: where the blocks have theirs.
        embedding_scale: multiplies the embedding's rows; `rounds_embedding_scale`: in the activations' type (Gemma).
        residual_scale: multiplies what each block adds to the stream.
        logits_scale, logits_softcap: see `Head`.
        layer_inputs: None: a layer sees the stream alone.
        rope_growth: how many frequencies of rotations are multiplied by the exponentials of a weight; 0: none.
        has_layer_scalars: each layer's result, the stream included, is multiplied by a number of its own.
        unused: regular expressions of tensors that checkpoints hold for nothing, and what they are, for people.
    """

    family: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    norm: Norm
    has_tied_head: bool
    layers: tuple[LayerSpec, ...]
    has_head_bias: bool = False
    has_position_embedding: bool = False
    num_draft_layers: int = 0
    norms: Norms = Norms.BEFORE
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    layer_inputs: LayerInputs | None = None
    rope_growth: int = 0
    has_layer_scalars: bool = False
    unused: tuple[tuple[str, str], ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @cached_property
    def moe_layer_ids(self) -> tuple[int, ...]:
        return tuple(i for i, layer in enumerate(self.layers) if layer.mlp.num_experts)

    @cached_property
    def carried(self) -> frozenset[str]:
        """Buffers that layers read, beside the stream, and have not written: see `LayerInputs`, `Attention.source`."""
        inputs = () if self.layer_inputs is None else (self.layer_inputs.buffer,)
        shared = (buffer for layer in self.layers for buffer in getattr(layer.attention, "shared_buffers", ()))
        return frozenset((*inputs, *shared))

    @property
    def carried_width(self) -> int:
        """Elements that a token takes in `carried`, and while they are made."""
        found = (getattr(layer.attention, "source", None) for layer in self.layers)
        sources: set[int] = {source for source in found if source is not None}
        shared = (heads * (key + value) for heads, key, value in (self.kv_shapes[source] for source in sources))
        return sum(shared) + (0 if self.layer_inputs is None else 2 * self.layer_inputs.width)

    @property
    def num_experts(self) -> int:
        """Experts in the widest layer; 0 for a dense model."""
        return max((layer.mlp.num_experts for layer in self.layers), default=0)

    @cached_property
    def expert_counts(self) -> tuple[int, ...]:
        """Experts of each of `moe_layer_ids`."""
        return tuple(self.layers[layer_id].mlp.num_experts for layer_id in self.moe_layer_ids)

    @property
    def num_active_experts(self) -> int:
        return max((layer.mlp.num_active_experts for layer in self.layers), default=0)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(kv_heads, key_dim, value_dim) of each layer."""
        return tuple(layer.attention.kv_shape for layer in self.layers)

    @property
    def index_dims(self) -> tuple[int, ...]:
        """Of each layer's key that its indexer finds a token by; 0: it has none."""
        return tuple(getattr(layer.attention, "index_dim", 0) for layer in self.layers)

    @property
    def num_chosen(self) -> int:
        """How many positions an indexer chooses for a token at most; 0: the model has none."""
        return max((getattr(layer.attention, "num_chosen", 0) for layer in self.layers), default=0)

    @property
    def state_shapes(self) -> tuple[StateShape | None, ...]:
        """Of each layer's recurrent state; None where it has none."""
        return tuple(layer.attention.state_shape for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Of one sequence's recurrent states in all layers; 0: the model has none."""
        return sum(shape.nbytes for shape in self.state_shapes if shape is not None)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Every weight of the decoder, in order of use."""
        hidden = self.hidden_size
        slots = [Slot("embedding", (self.vocab_size, hidden), "embedding")]
        if self.has_position_embedding:
            slots.append(Slot("positions", (self.max_positions, hidden), "embedding"))
        if self.layer_inputs is not None:
            slots += self.layer_inputs.slots(hidden)
        if self.rope_growth:
            slots.append(Slot("rope_growth", (self.rope_growth,), "norm"))
        for index, layer in enumerate(self.layers):
            for name, block in (("attention", layer.attention), ("mlp", layer.mlp)):
                prefix = f"layers.{index}.{name}"
                if self.norms.is_before:
                    slots += self.norm.slots(f"{prefix}_norm", hidden)
                slots += _prefixed(prefix, block.slots(hidden))
                if self.norms.is_behind:
                    slots += self.norm.slots(f"{prefix}_post_norm", hidden)
            if self.layer_inputs is not None:
                slots += _prefixed(f"layers.{index}.inputs", self.layer_inputs.layer_slots(hidden))
            if self.has_layer_scalars:
                slots.append(Slot(f"layers.{index}.scalar", (1,), "norm"))
        slots += self.norm.slots("norm", hidden)
        if not self.has_tied_head:
            slots.append(Slot("head", (self.vocab_size, hidden), "head"))
        if self.has_head_bias:
            slots.append(Slot("head_bias", (self.vocab_size,), "bias"))
        return tuple(slots)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(slot.shape) for slot in self.slots)

    @property
    def num_active_parameters(self) -> int:
        """Parameters that one token uses: of a layer's experts only the active ones."""
        idle = 0
        for layer in self.layers:
            if layer.mlp.num_experts:
                expert = sum(math.prod(s.shape) for s in layer.mlp.slots(self.hidden_size) if s.role == "expert")
                idle += expert * (layer.mlp.num_experts - layer.mlp.num_active_experts) // layer.mlp.num_experts
        return self.num_parameters - idle


def _prefixed(prefix: str, slots: Iterator[Slot]) -> Iterator[Slot]:
    return (replace(slot, name=f"{prefix}.{slot.name}") for slot in slots)


@dataclass(frozen=True)
class Family:
    """What is particular to one model family.

    Attributes:
        name: short name, `qwen3_moe`.
        architectures: entries of config.json's `architectures` that it serves.
        read_spec: config → spec; fails on values that it does not understand.
        names: slot pattern → the published checkpoint's name; `{}` stands for a number, in order.
        ignored: regular expressions of checkpoint tensors that hold no weight.
        left_out: regular expressions of checkpoint tensors that the decoder has no use for → what they are, for people.
        fused: checkpoint tensors that hold several weights, or one under another name.
        short_prefixes: how names start in some checkpoints → what that stands for.
        tiny_config: keyword arguments of the Hugging Face configuration class for the parity test.
        reads_own_layers: whether `read_spec` itself reads what config.json says of single layers (`own_layers`).
    """

    name: str
    architectures: tuple[str, ...]
    read_spec: Callable[[ConfigReader], ModelSpec]
    names: Mapping[str, str]
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    fused: tuple[FusedTensor, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    short_prefixes: Mapping[str, str] = field(default_factory=dict)
    tiny_config: Mapping[str, Any] = field(default_factory=dict)
    reads_own_layers: bool = False

    def logical_name(self, slot: Slot) -> str:
        """The published checkpoint's name of a slot: `model.layers.3.self_attn.q_proj.weight`."""
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", slot.name)
        return self.names[re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", slot.name)].format(*numbers)

    def is_ignored(self, name: str, spec: ModelSpec) -> bool:
        """Whether a checkpoint tensor may be left over."""
        layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if layer is not None and 0 <= int(layer[1]) - spec.num_layers < spec.num_draft_layers:
            return True
        if any(re.fullmatch(pattern, name) for pattern in self.ignored):
            return True
        return self.what_is_left_out(name, spec) is not None

    def what_is_left_out(self, name: str, spec: ModelSpec | None = None) -> str | None:
        """What a checkpoint tensor belongs to that the decoder has no use for; None if it is of the decoder.

        Args:
            spec: of the checkpoint, which may have no use for more.
        """
        known = (*self.left_out.items(), *(() if spec is None else spec.unused))
        return next((what for pattern, what in known if re.fullmatch(pattern, name)), None)

    def with_whole_names(self, weights: Mapping[str, T], names: Container[str]) -> dict[str, T]:
        """A checkpoint's weights under the model's `names`: completed where only the prefix is shorter."""
        if not self.short_prefixes:
            return dict(weights)

        def complete(name: str) -> str:
            if name in names:
                return name
            for short, whole in self.short_prefixes.items():
                longer = whole + name[len(short) :]
                if name.startswith(short) and longer in names and longer not in weights:
                    return longer
            return name

        return {complete(name): weight for name, weight in weights.items()}


class ConfigReader(Fields):
    """Typed access to a config.json. What cannot be is told like what is not supported."""

    least = 1
    null_is_false = True  # which is how the Hugging Face classes take it

    def completed(self, defaults: Mapping[str, Any]) -> ConfigReader:
        """The same config with values where keys are missing."""
        return ConfigReader({**defaults, **self.values}, self.where, self.path)

    def refuse(self, key: str, value: Any, allowed: str) -> NoReturn:
        self.unsupported(key, value, allowed)
