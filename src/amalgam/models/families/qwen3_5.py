"""Qwen3.5, the text part (`Qwen3_5ForCausalLM`, `Qwen3_5ForConditionalGeneration`): three layers of gated delta net to
one of gated attention, dense MLPs. What sees images is left out."""

from __future__ import annotations

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, DELTA_NET, HEAD_NORMS, MLP, in_language_model
from amalgam.models.reading.hybrid import (
    QWEN_LEFT_OUT,
    QWEN_SHORT_PREFIXES,
    read_hybrid_attention,
    read_text_model,
    text_config,
    with_qwen_norms,
)
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    text = text_config(config)
    mlp = DenseMlp(text.int("intermediate_size"))
    layers = tuple(LayerSpec(attention, mlp) for attention in read_hybrid_attention(text, default_kv_heads=4))
    return with_qwen_norms(read_text_model(config, text, "qwen3_5", layers))


FAMILY = Family(
    name="qwen3_5",
    architectures=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    read_spec=_read_spec,
    names=in_language_model({**DECODER, **ATTENTION, **HEAD_NORMS, **DELTA_NET, **MLP}),
    left_out=QWEN_LEFT_OUT,
    short_prefixes=QWEN_SHORT_PREFIXES,
    tiny_config={
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "intermediate_size": 128,
    },
)
