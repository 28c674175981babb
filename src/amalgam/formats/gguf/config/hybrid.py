"""Architectures in which some layers have a recurrent state in place of attention."""

from __future__ import annotations

from collections.abc import Mapping

from amalgam.formats.gguf.config.decoder import common, decoder
from amalgam.formats.gguf.config.dense import granite
from amalgam.formats.gguf.config.experts import SIGMOID, grouped_experts, softmax_experts
from amalgam.formats.gguf.config.grouped import latent_sizes
from amalgam.formats.gguf.config.metadata import Builder, Config, Metadata
from amalgam.formats.gguf.config.rope import rope_parameters


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


def _kv_heads(metadata: Metadata) -> list[int]:
    """Of each layer; 0 where it has a state instead."""
    key = "attention.head_count_kv"
    numbers = metadata.per_layer(key, metadata.num_layers())
    if min(numbers) < 0 or len({number for number in numbers if number}) != 1:
        metadata.unsupported(key, numbers, "the same number for every layer that has attention, and one that has")
    return numbers


def _granite_hybrid(metadata: Metadata) -> Config:
    """Granite 4 with layers of Mamba-2; without any, converters write it as granite or granitemoe."""
    kv_heads = _kv_heads(metadata)
    config = granite(metadata, max(kv_heads))
    heads, inner = metadata.int("ssm.time_step_rank", low=1), metadata.int("ssm.inner_size", low=1)
    for key, size, whole in (("ssm.time_step_rank", heads, inner), ("embedding_length", config["hidden_size"], inner)):
        if whole % size:
            metadata.refuse(key, size, f"a divisor of ssm.inner_size {inner}")
    shared = metadata.int("expert_shared_feed_forward_length", default=0)
    if metadata.int("expert_count", default=0):
        config |= softmax_experts(metadata)
    else:
        config |= {"num_local_experts": 0}
        shared = shared or config["intermediate_size"]
    first = kv_heads.index(max(kv_heads))
    return config | {
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "shared_intermediate_size": shared,
        "attention_bias": metadata.has_tensor(f"blk.{first}.attn_q.bias"),
        # llama.cpp rotates unless this says no.
        "position_embedding_type": "rope" if metadata.bool("rope.scaling.finetuned", default=True) else "nope",
        "layer_types": ["full_attention" if number else "linear_attention" for number in kv_heads],
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // config["hidden_size"],
        "mamba_n_groups": metadata.int("ssm.group_count", low=1),
        "mamba_d_state": metadata.int("ssm.state_size"),
        "mamba_d_conv": metadata.int("ssm.conv_kernel"),
        "mamba_conv_bias": metadata.has_tensor_like(r"blk\.\d+\.ssm_conv1d\.bias"),
        "mamba_proj_bias": metadata.has_tensor_like(r"blk\.\d+\.ssm_in\.bias"),
    }


def _lfm2(metadata: Metadata, architecture: str = "Lfm2ForCausalLM") -> Config:
    kv_heads = _kv_heads(metadata)
    config = decoder(metadata, architecture, kv_heads=max(kv_heads))
    return config | {
        "norm_eps": config["rms_norm_eps"],
        "conv_L_cache": metadata.int("shortconv.l_cache"),
        "conv_bias": metadata.has_tensor_like(r"blk\.\d+\.shortconv\.conv\.bias"),
        "layer_types": ["full_attention" if number else "conv" for number in kv_heads],
        "block_auto_adjust_ff_dim": False,
    }


def _lfm2_moe(metadata: Metadata) -> Config:
    metadata.expect("expert_gating_func", SIGMOID)
    return _lfm2(metadata, "Lfm2MoeForCausalLM") | {
        "num_experts": metadata.num_experts(),
        "num_experts_per_tok": metadata.int("expert_used_count"),
        "moe_intermediate_size": metadata.int("expert_feed_forward_length"),
        "num_dense_layers": metadata.int("leading_dense_block_count", default=0),
        "use_expert_bias": metadata.has_tensor_like(r"blk\.\d+\.exp_probs_b\.bias"),
        # llama.cpp does so whatever the file says.
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=True),
        "routed_scaling_factor": metadata.number("expert_weights_scale", 1.0) or 1.0,
    }


def _bailing3(metadata: Metadata) -> Config:
    """Ling 3: Kimi delta nets, and latent attention with a gate per head in layers that have KV heads.

    Files of the model that sees images say `rope.dimension_sections`, and llama.cpp turns halves then, not pairs.
    """
    kv_heads = _kv_heads(metadata)
    config = common(metadata, "BailingMoeV3ForCausalLM", kv_heads=max(kv_heads))
    num_layers, head_dim = config["num_hidden_layers"], metadata.int("kda.head_dim")
    config |= grouped_experts(metadata, None) | latent_sizes(metadata, head_dim)
    metadata.expect("expert_gating_func", SIGMOID)
    metadata.expect("expert_shared_feed_forward_length", config["n_shared_experts"] * config["moe_intermediate_size"])
    metadata.expect("kda.safe_gate", True)
    limits = {kind: metadata.limits(f"swiglu_clamp_{kind}", num_layers) for kind in ("exp", "shexp")}
    num_dense = config["first_k_dense_replace"]
    if any(limits["shexp"][:num_dense]):  # llama.cpp heeds them, the family does not
        metadata.unsupported("swiglu_clamp_shexp", limits["shexp"], f"0 for the {num_dense} layers without experts")
    return config | {
        "num_key_value_heads": config["num_attention_heads"],
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=False),
        "expert_swiglu_limit_list": limits["exp"],
        "share_expert_swiglu_limit_list": limits["shexp"],
        "layer_types": ["full_attention" if number else "linear_attention" for number in kv_heads],
        "rope_parameters": rope_parameters(metadata, config["qk_rope_head_dim"]),
        "head_dim": head_dim,
        "short_conv_kernel_size": metadata.int("ssm.conv_kernel"),
        "kda_safe_gate": True,
        "kda_lower_bound": metadata.number("kda.gate_lower_bound"),
        "no_kda_lora": True,
    }


ARCHITECTURES: Mapping[str, Builder] = {
    "bailingmoe3": _bailing3,
    "granitehybrid": _granite_hybrid,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2_moe,
    "qwen3next": _qwen3_next,
    "qwen35": _qwen3_5,
    "qwen35moe": _qwen3_5_moe,
}
MODEL_TYPES: Mapping[str, str] = {
    "BailingMoeV3ForCausalLM": "bailing_hybrid",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3_5ForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
}
