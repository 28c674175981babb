"""Qwen1.5-MoE and Qwen2-MoE (`Qwen2MoeForCausalLM`): Qwen2's attention, experts beside a gated shared expert."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, FUSED_EXPERTS, GATED_SHARED_EXPERT, MLP
from amalgam.models.reading.attention import read_attention, windowed
from amalgam.models.reading.layers import read_expert_counts, read_model, read_sparse_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    if config.bool("use_sliding_window", default=False) and config.get("layer_types") is None:
        # The published code and today's class choose different layers.
        config.refuse("use_sliding_window", True, "false, or true with layer_types")
    attention = replace(read_attention(config, default_kv_heads=16), has_qkv_bias=config.bool("qkv_bias", default=True))
    moe = SparseMoe(
        router=SoftmaxRouter(*read_expert_counts(config), normalises=config.bool("norm_topk_prob", default=False)),
        intermediate_size=config.int("moe_intermediate_size"),
        shared_size=config.int("shared_expert_intermediate_size"),
        has_shared_gate=True,
    )
    return read_model(config, "qwen2_moe", read_sparse_layers(config, windowed(config, attention), moe))


FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        **MLP,
        **EXPERTS,
        **GATED_SHARED_EXPERT,
    },
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [],
    },
)
