"""Architectures in which some layers have a recurrent state in place of attention."""

from __future__ import annotations

from collections.abc import Mapping

from amalgam.formats.gguf.config.decoder import decoder
from amalgam.formats.gguf.config.experts import softmax_experts
from amalgam.formats.gguf.config.metadata import Builder, Config, Metadata


def _hybrid(metadata: Metadata, architecture: str) -> Config:
    """Gated delta nets, with attention in every `full_attention_interval`th layer."""
    config = decoder(metadata, architecture)
    key_heads, value_heads = metadata.int("ssm.group_count", low=1), metadata.int("ssm.time_step_rank", low=1)
    inner = metadata.int("ssm.inner_size", low=1)
    if inner % value_heads:
        metadata.refuse("ssm.inner_size", inner, f"a multiple of ssm.time_step_rank {value_heads}")
    metadata.pass_over(["rope.dimension_sections"])  # of images; a text's tokens have the same position on each axis
    interval = metadata.int("full_attention_interval", default=4, low=1)
    first_full = f"blk.{interval - 1}.attn_q.bias"
    return config | {
        "attention_bias": metadata.has_tensor(first_full),
        "full_attention_interval": interval,
        "linear_conv_kernel_dim": metadata.int("ssm.conv_kernel"),
        "linear_key_head_dim": metadata.int("ssm.state_size"),
        "linear_value_head_dim": inner // value_heads,
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": value_heads,
    }


def _hybrid_experts(metadata: Metadata) -> Config:
    return softmax_experts(metadata) | {
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate(_up)?_exps"),
        "shared_expert_intermediate_size": metadata.width("expert_shared_feed_forward_length", "ffn_gate_shexp"),
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=True),
    }


def _qwen3_next(metadata: Metadata) -> Config:
    config = _hybrid(metadata, "Qwen3NextForCausalLM") | _hybrid_experts(metadata)
    # Until the end of 2025 the converter left queries, keys, values and gates in one projection.
    return config | {"linear_grouped_values": metadata.has_tensor("blk.0.ssm_in.weight")}


def _qwen3_5(metadata: Metadata) -> Config:
    config = _hybrid(metadata, "Qwen3_5ForCausalLM")
    return config | {"linear_tiled_heads": config["linear_num_value_heads"] != config["linear_num_key_heads"]}


def _qwen3_5_moe(metadata: Metadata) -> Config:
    config = _hybrid(metadata, "Qwen3_5MoeForCausalLM") | _hybrid_experts(metadata)
    return config | {"linear_tiled_heads": config["linear_num_value_heads"] != config["linear_num_key_heads"]}


ARCHITECTURES: Mapping[str, Builder] = {
    "qwen3next": _qwen3_next,
    "qwen35": _qwen3_5,
    "qwen35moe": _qwen3_5_moe,
}
MODEL_TYPES: Mapping[str, str] = {
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
}
