"""Llama 4, text and the text part (`Llama4ForCausalLM`, `Llama4ForConditionalGeneration`): attention in chunks with
rotary positions, and in every fourth layer over everything without; one expert per token beside a shared one, in all
layers or in some. What sees images is left out.

Meta 2025, "The Llama 4 herd".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from amalgam.kernels.program import Route, Rows
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, LANGUAGE_MODEL, VISION, fused_experts, stored_in_language_model
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.hybrid import text_config
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

NORM_EPS, THETA = 1e-5, 500000.0
_FULL, _CHUNKED = "full_attention", "chunked_attention"


@dataclass(frozen=True)
class ApartRouter:
    """The largest scores; the weight of each is its own sigmoid."""

    num_experts: int
    num_active_experts: int

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        return Route(x, weights["router"], layer_id, self.num_active_experts, scoring="apart")


def _read_flags(config: ConfigReader) -> list[bool]:
    """Which layers have rotary positions."""
    num_layers, period = config.int("num_hidden_layers"), config.int("no_rope_layer_interval", default=4)
    flags = config.get("no_rope_layers") or [int((i + 1) % period != 0) for i in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or not all(flag in (0, 1) for flag in flags):
        config.refuse("no_rope_layers", flags, f"{num_layers} of 0 and 1")
    return [bool(flag) for flag in flags[:num_layers]]


def _read_attentions(config: ConfigReader) -> list[Attention]:
    common = read_attention(
        config,
        default_theta=THETA,
        default_head_dim=128,
        default_kv_heads=8,
        default_eps=NORM_EPS,
        has_bias=config.bool("attention_bias", default=False),
    )
    turning = replace(common, is_interleaved=True, has_unit_norm=config.bool("use_qk_norm", default=True))
    still = replace(common, rope=None)
    if config.bool("attn_temperature_tuning", default=True):
        beta, length = config.float("attn_scale", default=0.1), config.int("floor_scale", default=8192)
        still = replace(still, sharpening=(beta, length, 1))
    flags = _read_flags(config)
    types = config.get("layer_types", default=[_CHUNKED if flag else _FULL for flag in flags])
    if not isinstance(types, list) or len(types) != len(flags) or not set(types) <= {_FULL, _CHUNKED}:
        config.refuse("layer_types", types, f"{len(flags)} of {_FULL}, {_CHUNKED}")
    chunk = config.int("attention_chunk_size", default=8192) if _CHUNKED in types else None
    return [
        replace(turning if flag else still, chunk=chunk if kind == _CHUNKED else None)
        for flag, kind in zip(flags, types, strict=True)
    ]


def _read_spec(config: ConfigReader) -> ModelSpec:
    config = text_config(config)
    num_layers, period = config.int("num_hidden_layers"), config.int("interleave_moe_layer_step", default=1)
    num_experts, num_active = read_expert_counts(config, default_experts=16, default_active=1)
    if num_active != 1:
        config.refuse("num_experts_per_tok", num_active, "1: a token's gate weight multiplies what its expert sees")
    size = config.int("intermediate_size")
    moe = SparseMoe(ApartRouter(num_experts, num_active), size, shared_size=size, weighs_input=True)
    dense = DenseMlp(config.int("intermediate_size_mlp", default=16384))
    sparse = config.list(
        "moe_layers", of=int, what="layer numbers", default=list(range(period - 1, num_layers, period))
    )
    layers = tuple(
        LayerSpec(attention, moe if i in sparse else dense) for i, attention in enumerate(_read_attentions(config))
    )
    return read_model(config, "llama4", layers, default_eps=NORM_EPS)


_LAYER = "model.layers.{}"
_BLOCK = f"{_LAYER}.feed_forward"
_PARTS = ("gate_proj", "up_proj", "down_proj")

FAMILY = Family(
    name="llama4",
    architectures=("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        "layers.{}.mlp.router": f"{_BLOCK}.router.weight",
        **{f"layers.{{}}.mlp.{part.removesuffix('_proj')}": f"{_BLOCK}.{part}.weight" for part in _PARTS},
        **{
            f"layers.{{}}.mlp.shared.{part.removesuffix('_proj')}": f"{_BLOCK}.shared_expert.{part}.weight"
            for part in _PARTS
        },
        **{
            f"layers.{{}}.mlp.experts.{{}}.{part.removesuffix('_proj')}": f"{_BLOCK}.experts.{{}}.{part}.weight"
            for part in _PARTS
        },
    },
    fused=stored_in_language_model(
        fused_experts(f"{_BLOCK}.experts.{{}}", _PARTS, is_transposed=True, stored=f"{_BLOCK}.experts")
    ),
    left_out=VISION,
    short_prefixes=LANGUAGE_MODEL,
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_hidden_layers": 4,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
        "floor_scale": 8,
    },
)
