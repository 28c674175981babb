"""Qwen3.5 with experts, the text part (`Qwen3_5MoeForCausalLM`, `Qwen3_5MoeForConditionalGeneration`): Qwen3.5's
layers, experts beside a gated shared expert in each. What sees images is left out."""

from __future__ import annotations

from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.naming import (
    ATTENTION,
    DECODER,
    DELTA_NET,
    EXPERTS,
    FUSED_EXPERTS,
    GATED_SHARED_EXPERT,
    HEAD_NORMS,
    fused_in_language_model,
    in_language_model,
)
from amalgam.models.reading.hybrid import (
    QWEN_LEFT_OUT,
    QWEN_SHORT_PREFIXES,
    read_hybrid_attention,
    read_text_model,
    text_config,
    with_qwen_norms,
)
from amalgam.models.reading.layers import read_expert_counts
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    text = text_config(config)
    moe = SparseMoe(
        router=SoftmaxRouter(*read_expert_counts(text), normalises=True),
        intermediate_size=text.int("moe_intermediate_size"),
        shared_size=text.int("shared_expert_intermediate_size"),
        has_shared_gate=True,
    )
    text.expect("norm_topk_prob", True)
    layers = tuple(LayerSpec(attention, moe) for attention in read_hybrid_attention(text))
    return with_qwen_norms(read_text_model(config, text, "qwen3_5_moe", layers))


FAMILY = Family(
    name="qwen3_5_moe",
    architectures=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    read_spec=_read_spec,
    names=in_language_model({**DECODER, **ATTENTION, **HEAD_NORMS, **DELTA_NET, **EXPERTS, **GATED_SHARED_EXPERT}),
    fused=fused_in_language_model(FUSED_EXPERTS),
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
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
)
