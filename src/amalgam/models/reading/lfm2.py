"""LFM2, dense and mixture: short convolutions beside attention."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.blocks.short_convolution import ShortConvolution
from amalgam.models.naming import with_biases
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import AttentionBlock, ConfigReader, LayerSpec, ModelSpec

_NORM_EPS, _THETA, _KV_HEADS, _ROWS = 1e-5, 1e6, 8, 3  # the configuration classes' defaults
_LAYER = "model.layers.{}"

LFM2 = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.embedding_norm.weight",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": f"{_LAYER}.operator_norm.weight",
    "layers.{}.mlp_norm": f"{_LAYER}.ffn_norm.weight",
    **{f"layers.{{}}.attention.{part}": f"{_LAYER}.self_attn.{part}_proj.weight" for part in ("q", "k", "v")},
    "layers.{}.attention.o": f"{_LAYER}.self_attn.out_proj.weight",
    **{f"layers.{{}}.attention.{part}_norm": f"{_LAYER}.self_attn.{part}_layernorm.weight" for part in ("q", "k")},
    **with_biases(
        {
            "layers.{}.attention.bcx": f"{_LAYER}.conv.in_proj.weight",
            "layers.{}.attention.convolution": f"{_LAYER}.conv.conv.weight",
            "layers.{}.attention.out": f"{_LAYER}.conv.out_proj.weight",
        }
    ),
    "layers.{}.mlp.gate": f"{_LAYER}.feed_forward.w1.weight",
    "layers.{}.mlp.up": f"{_LAYER}.feed_forward.w3.weight",
    "layers.{}.mlp.down": f"{_LAYER}.feed_forward.w2.weight",
}


def read_lfm2_attention(config: ConfigReader, default_types: list[str] | None = None) -> tuple[AttentionBlock, ...]:
    """Attention or convolution of each layer, as `layer_types` says."""
    num_layers = config.int("num_hidden_layers")
    attention = replace(
        read_attention(config, default_theta=_THETA, default_kv_heads=_KV_HEADS),
        norm_eps=_read_norm_eps(config),
        has_head_norm=True,
    )
    convolution = ShortConvolution(
        width=config.int("hidden_size"),
        kernel_size=config.int("conv_L_cache", default=_ROWS, low=2, high=64),
        has_bias=config.bool("conv_bias", default=False),
    )
    known: dict[str, AttentionBlock] = {"full_attention": attention, "conv": convolution}
    types = config.get("layer_types", default=default_types)
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in tuple(known) for kind in types):
        config.refuse("layer_types", types, f"{num_layers} of {', '.join(known)}")
    if "full_attention" not in types:
        config.refuse("layer_types", types, "at least one full_attention")
    return tuple(known[kind] for kind in types)


def read_lfm2_model(config: ConfigReader, family: str, layers: tuple[LayerSpec, ...]) -> ModelSpec:
    """The parts of a spec that do not depend on the blocks."""
    is_tied = config.bool("tie_embedding", default=config.bool("tie_word_embeddings", default=True))
    return replace(read_model(config, family, layers), norm=RmsNorm(_read_norm_eps(config)), has_tied_head=is_tied)


def _read_norm_eps(config: ConfigReader) -> float:
    return config.float("norm_eps", default=_NORM_EPS, low=0)
