"""Architectures with experts that a router chooses from all at once."""

from __future__ import annotations

from collections.abc import Mapping

from amalgam.formats.gguf.config.decoder import decoder
from amalgam.formats.gguf.config.dense import granite
from amalgam.formats.gguf.config.experts import SIGMOID, SOFTMAX, SOFTMAX_OF_CHOSEN, UNSAID, experts, softmax_experts
from amalgam.formats.gguf.config.metadata import Builder, Config, Metadata


def _qwen2_moe(metadata: Metadata) -> Config:
    config = decoder(metadata, "Qwen2MoeForCausalLM") | softmax_experts(metadata)
    return config | {
        "qkv_bias": config["attention_bias"],
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate(_up)?_exps"),
        "shared_expert_intermediate_size": metadata.width("expert_shared_feed_forward_length", "ffn_gate_shexp"),
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=False),
    }


def _qwen3_moe(metadata: Metadata) -> Config:
    config = decoder(metadata, "Qwen3MoeForCausalLM") | softmax_experts(metadata)
    return config | {
        "moe_intermediate_size": metadata.width("expert_feed_forward_length", "ffn_gate(_up)?_exps"),
        # Never written, and always true in the models of this architecture.
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=True),
    }


def _olmoe(metadata: Metadata) -> Config:
    config = decoder(metadata, "OlmoeForCausalLM") | softmax_experts(metadata)
    if metadata.has("attention.clamp_kqv"):
        config["clip_qkv"] = metadata.number("attention.clamp_kqv")
    return config | {"norm_topk_prob": metadata.bool("expert_weights_norm", default=False)}


def _granite_moe(metadata: Metadata) -> Config:
    # Softmax over the chosen experts' logits is what a softmax over all comes to when it is normalised.
    config = granite(metadata) | softmax_experts(metadata)
    shared = metadata.int("expert_shared_feed_forward_length", default=0)
    kind = "GraniteMoeSharedForCausalLM" if shared else "GraniteMoeForCausalLM"
    return config | {"architectures": [kind], "shared_intermediate_size": shared}


def _minimax_m2(metadata: Metadata) -> Config:
    config = decoder(metadata, "MiniMaxM2ForCausalLM") | experts(metadata)
    metadata.expect("expert_gating_func", UNSAID, SIGMOID)
    size = metadata.int("expert_feed_forward_length", default=config["intermediate_size"])
    return config | {"intermediate_size": size}


def _ernie4_5_moe(metadata: Metadata) -> Config:
    config = decoder(metadata, "Ernie4_5_MoeForCausalLM")
    metadata.expect("expert_gating_func", UNSAID, SOFTMAX)
    size = metadata.int("expert_feed_forward_length")
    shared = metadata.int("expert_shared_count", default=0)
    # What converters write is the width of a dense layer divided by the number of KV heads, whatever is shared.
    metadata.pass_over({"expert_shared_feed_forward_length"})
    if shared and metadata.width("", "ffn_gate_shexp") != shared * size:
        metadata.unsupported("expert_shared_count", shared, f"experts of {size} outputs in ffn_gate_shexp")
    return config | {
        "use_bias": config["attention_bias"],
        "moe_num_experts": metadata.num_experts(),
        "moe_k": metadata.int("expert_used_count"),
        "moe_intermediate_size": size,
        "moe_num_shared_experts": shared,
        "moe_layer_start_index": metadata.int("leading_dense_block_count", default=0),
        "moe_layer_interval": metadata.int("interleave_moe_layer_step", default=1),
    }


def _hunyuan_moe(metadata: Metadata) -> Config:
    config = decoder(metadata, "HunYuanMoEV1ForCausalLM") | softmax_experts(metadata)
    metadata.expect("expert_shared_count", 0, 1)
    metadata.pass_over({"rope.scaling.original_context_length"})  # told with a base that is stretched already
    for key in ("expert_feed_forward_length", "expert_shared_feed_forward_length"):
        metadata.expect(key, config["intermediate_size"])
    return config | {"moe_topk": config["num_experts_per_tok"]}


def _llama4(metadata: Metadata) -> Config:
    config = decoder(metadata, "Llama4ForCausalLM") | experts(metadata)
    metadata.expect("expert_gating_func", UNSAID, SIGMOID)
    metadata.expect("leading_dense_block_count", 0)
    metadata.pass_over({"attention.sliding_window"})  # llama.cpp takes 8192, and sets the sizes below likewise
    return config | {
        "intermediate_size_mlp": config["intermediate_size"],
        "intermediate_size": metadata.int("expert_feed_forward_length"),
        "interleave_moe_layer_step": metadata.int("interleave_moe_layer_step", default=1),
        "use_qk_norm": config["num_experts"] != 128,
        "attention_chunk_size": 8192,
        "floor_scale": 8192,
        "attn_scale": 0.1,
    }


def _gpt_oss(metadata: Metadata) -> Config:
    config = decoder(metadata, "GptOssForCausalLM") | experts(metadata)
    # Softmax over the chosen experts' logits, told by the architecture.
    metadata.expect("expert_gating_func", UNSAID, SOFTMAX, SOFTMAX_OF_CHOSEN)
    metadata.expect("rope.freq_base_swa", metadata.number("rope.freq_base", 10000.0))
    if config["rope_parameters"]["rope_type"] == "yarn":
        config["rope_parameters"]["truncate"] = False
    metadata.expect_pattern(2, config["num_hidden_layers"])
    types = [f"{('sliding', 'full')[layer % 2]}_attention" for layer in range(config["num_hidden_layers"])]
    return config | {
        "intermediate_size": metadata.int("expert_feed_forward_length", default=config["intermediate_size"]),
        "sliding_window": metadata.int("attention.sliding_window"),
        "layer_types": types,
        "swiglu_limit": 7.0,
    }


ARCHITECTURES: Mapping[str, Builder] = {
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
    "granitemoe": _granite_moe,
    "minimax-m2": _minimax_m2,
    "ernie4_5-moe": _ernie4_5_moe,
    "hunyuan-moe": _hunyuan_moe,
    "llama4": _llama4,
    "gpt-oss": _gpt_oss,
}
MODEL_TYPES: Mapping[str, str] = {
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeSharedForCausalLM": "granitemoeshared",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe",
    "Llama4ForCausalLM": "llama4_text",
    "GptOssForCausalLM": "gpt_oss",
}
