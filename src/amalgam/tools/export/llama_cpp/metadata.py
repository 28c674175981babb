"""A model's spec → the metadata that all architectures of GGUF share.

In: a spec. Out: keys with values, the prefix of the architecture left out; tables that are tensors. Must never know:
weights, files, which model wants which keys (`architectures`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.latent_attention import LatentAttention
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.rope import Linear, Llama3, LongRope, Proportional, Rope, Yarn
from amalgam.models.spec import ModelSpec

Block = TypeVar("Block")
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers for how a router scores
_STILL = 1e30  # what the frequency of a pair that does not turn is divided by


@dataclass(frozen=True)
class Described:
    """What a file says of a model.

    Attributes:
        keys: without the architecture's prefix.
        tables: tensors that hold no weights.
    """

    keys: dict[str, Any]
    tables: dict[str, Tensor] = field(default_factory=dict)


class Model:
    """A spec, looked at for what GGUF tells of it."""

    def __init__(self, spec: ModelSpec, config: Mapping[str, Any]) -> None:
        """
        Args:
            config: of the base checkpoint, its text part: for what no spec keeps.
        """
        self.spec = spec
        self.config = config

    def blocks(self, kind: type[Block]) -> Iterator[Block]:
        """Attention and MLP blocks of a kind, in order of the layers."""
        for layer in self.spec.layers:
            for block in (layer.attention, layer.mlp):
                if isinstance(block, kind):
                    yield block

    @cached_property
    def attention(self) -> Attention | LatentAttention:
        """Of the first layer that has any."""
        found = next((block for block in self.blocks(object) if isinstance(block, Attention | LatentAttention)), None)
        assert found is not None
        return found

    @cached_property
    def moe(self) -> SparseMoe | None:
        """Of the first layer that has experts."""
        return next(self.blocks(SparseMoe), None)

    @cached_property
    def rope(self) -> Rope | None:
        """Of the first layer that turns, whole contexts before windows."""
        attentions = [layer.attention for layer in self.spec.layers if layer.attention.rope is not None]
        full = [attention for attention in attentions if getattr(attention, "window", None) is None]
        return (full or attentions)[0].rope if attentions else None

    @cached_property
    def window(self) -> int | None:
        return next((found for layer in self.spec.layers if (found := getattr(layer.attention, "window", None))), None)

    @cached_property
    def dense_size(self) -> int:
        """Width of the dense MLPs; of a model that has none what its config.json says, or an expert's."""
        for layer in self.spec.layers:
            size = getattr(layer.mlp, "intermediate_size" if not layer.mlp.num_experts else "dense_size", None)
            if size is not None:
                return int(size)
        assert self.moe is not None
        return int(self.config.get("intermediate_size_mlp") or self.config.get("intermediate_size")
                   or self.moe.intermediate_size)  # fmt: skip

    @cached_property
    def num_dense(self) -> int:
        """Layers before the first one with experts."""
        return next((i for i, layer in enumerate(self.spec.layers) if layer.mlp.num_experts), self.spec.num_layers)


def described(model: Model) -> Described:
    """Sizes, norms, heads, positions and counts of experts."""
    spec, attention = model.spec, model.attention
    eps = spec.norm.eps  # type: ignore[attr-defined]
    is_layer_norm = type(spec.norm).__name__ == "LayerNorm"
    keys: dict[str, Any] = {
        "block_count": spec.num_layers,
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden_size,
        "feed_forward_length": model.dense_size,
        "attention.head_count": attention.num_heads,
        f"attention.layer_norm_{'' if is_layer_norm else 'rms_'}epsilon": float(eps),
        "vocab_size": spec.vocab_size,
    }
    if isinstance(attention, Attention):
        keys["attention.head_count_kv"] = attention.num_kv_heads
        if not spec.has_position_embedding:
            keys |= {"attention.key_length": attention.head_dim, "attention.value_length": attention.head_dim}
    tables: dict[str, Tensor] = {}
    if model.rope is not None:
        keys |= _rope(model.rope)
        tables = _tables(model.rope)
    if model.moe is not None:
        keys |= {"expert_count": model.moe.num_experts, "expert_used_count": model.moe.num_active_experts}
    return Described(keys, tables)


def _rope(rope: Rope) -> dict[str, Any]:
    keys: dict[str, Any] = {"rope.freq_base": float(rope.theta), "rope.dimension_count": rope.rotary_dim}
    match rope.scaling:
        case Linear(factor=factor):
            keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(factor)}
        case Yarn() as yarn:
            keys |= {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": float(yarn.factor),
                "rope.scaling.original_context_length": int(yarn.original_max_positions),
            }
            if (yarn.beta_fast, yarn.beta_slow) != (32.0, 1.0):
                keys["rope.scaling.yarn_beta_fast"] = float(yarn.beta_fast)
                keys["rope.scaling.yarn_beta_slow"] = float(yarn.beta_slow)
        case LongRope() as long:
            keys["rope.scaling.original_context_length"] = int(long.original_max_positions)
            keys["rope.scaling.attn_factor"] = float(long.long_attention_factor)
    return keys


def _tables(rope: Rope) -> dict[str, Tensor]:
    match rope.scaling:
        case Llama3() as scaling:
            frequencies, _ = scaling(rope, 0)
            return {"rope_freqs.weight": 1.0 / rope.periods() / frequencies}
        case LongRope() as scaling:
            factors = {"long": scaling.long_factors, "short": scaling.short_factors}
            return {f"rope_factors_{length}.weight": torch.tensor(values) for length, values in factors.items()}
        case Proportional() as scaling:
            divisors = torch.full((rope.rotary_dim // 2,), _STILL)
            divisors[: scaling.num_turning] = 1.0
            return {"rope_freqs.weight": divisors}
    return {}


def yarn_factor(rope: Rope | None) -> float | None:
    """How much YaRN sharpens attention where it is not what its class does by itself; None: it does that."""
    scaling = None if rope is None else rope.scaling
    if not isinstance(scaling, Yarn):
        return None
    default = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return None if math.isclose(scaling.attention_factor, default, rel_tol=1e-6) else scaling.attention_factor


Extra = Callable[[Model], Mapping[str, Any]]
