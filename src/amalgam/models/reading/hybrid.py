"""Models whose layers are of gated delta nets and of gated attention, and the text part of multimodal models."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.delta_net import DeltaNet
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.reading.attention import NORM_EPS, read_normed_attention
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import DRAFT_LAYERS, AttentionBlock, ConfigReader, LayerSpec, ModelSpec

_HEAD_DIM, _KV_HEADS, _ROTARY = 256, 2, 0.25  # the configuration classes' defaults
QWEN_SHORT_PREFIXES = {"model.": "model.language_model."}  # of the text part saved by itself
QWEN_LEFT_OUT = {r"model\.visual\..*": "the vision encoder", r"mtp\..*": DRAFT_LAYERS}


def read_hybrid_attention(
    config: ConfigReader, *, default_kv_heads: int = _KV_HEADS, has_groups: bool = False
) -> tuple[AttentionBlock, ...]:
    """Attention or delta net of each layer, as `layer_types` says, else `full_attention_interval`."""
    config.expect("attn_output_gate", True)
    config.expect("mamba_ssm_dtype", "float32")
    num_layers = config.int("num_hidden_layers")
    interval = config.int("full_attention_interval", default=4)
    default_types = [f"{'linear' if (i + 1) % interval else 'full'}_attention" for i in range(num_layers)]
    types = config.get("layer_types", default=default_types)
    known: dict[str, AttentionBlock] = {
        "full_attention": _read_gated_attention(config, default_kv_heads),
        "linear_attention": _read_delta_net(config, has_groups),
    }
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in tuple(known) for kind in types):
        config.refuse("layer_types", types, f"{num_layers} of {', '.join(known)}")
    if "full_attention" not in types:
        config.refuse("layer_types", types, "at least one full_attention")
    return tuple(known[kind] for kind in types)


def _read_gated_attention(config: ConfigReader, default_kv_heads: int) -> Attention:
    common = read_normed_attention(
        config, default_head_dim=_HEAD_DIM, default_kv_heads=default_kv_heads, default_rotary=_ROTARY
    )
    return replace(common, head_norm_adds_one=True, has_gate=True)


def _read_delta_net(config: ConfigReader, has_groups: bool) -> DeltaNet:
    key_heads, value_heads = (
        config.int(f"linear_num_{kind}_heads", default=default) for kind, default in (("key", 16), ("value", 32))
    )
    if value_heads % key_heads:
        config.refuse("linear_num_value_heads", value_heads, f"a multiple of linear_num_key_heads {key_heads}")
    return DeltaNet(
        num_key_heads=key_heads,
        num_value_heads=value_heads,
        key_dim=config.int("linear_key_head_dim", default=128),
        value_dim=config.int("linear_value_head_dim", default=128),
        kernel_size=config.int("linear_conv_kernel_dim", default=4, low=2, high=64),
        norm_eps=config.float("rms_norm_eps", default=NORM_EPS, low=0),
        # GGUF files say how the converter has laid the weights out.
        has_grouped_values=config.bool("linear_grouped_values", default=has_groups),
        has_grouped_rates=has_groups,
        is_tiled=config.bool("linear_tiled_heads", default=False),
    )


def with_qwen_norms(spec: ModelSpec) -> ModelSpec:
    """The spec with norms whose weights are stored without the 1 that is added to them."""
    assert isinstance(spec.norm, RmsNorm)
    return replace(spec, norm=replace(spec.norm, rounds_last=True, adds_one=True))


def text_config(config: ConfigReader) -> ConfigReader:
    """What a multimodal model's config says of its text part; of a text model all of it."""
    return config.object("text_config", default=None) or config


def read_text_model(config: ConfigReader, text: ConfigReader, family: str, layers: tuple[LayerSpec, ...]) -> ModelSpec:
    """`read_model` of a `text_config`; whether the head is the embedding is said beside it, if at all."""
    spec = read_model(text, family, layers)
    return replace(spec, has_tied_head=config.bool("tie_word_embeddings", default=spec.has_tied_head))
