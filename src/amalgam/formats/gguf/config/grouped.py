"""Architectures with experts as DeepSeek has them: shared ones, dense layers first, corrected scores, groups."""

from __future__ import annotations

from collections.abc import Mapping

from amalgam.formats.gguf.config.decoder import common, decoder
from amalgam.formats.gguf.config.experts import SIGMOID, SOFTMAX, UNSAID, corrected_experts, grouped_experts
from amalgam.formats.gguf.config.metadata import Builder, Config, Metadata
from amalgam.formats.gguf.config.rope import rope_parameters

# Groups of experts, and how many may be used, by layers and experts of the models that were converted before the key
# existed (autumn of 2025): DeepSeek V2 and V2-Lite, V3 and R1, Moonlight, Kimi K2; and GLM-4.7-Flash.
_GROUPS = {(60, 160): (8, 3), (27, 64): (1, 1), (61, 256): (8, 4), (61, 384): (1, 1), (47, 64): (1, 1)}
_BETA = 0.1  # of Mistral 4's class, and of the one model


def _deepseek2(metadata: Metadata) -> Config:
    gating = metadata.int("expert_gating_func", default=UNSAID)
    if gating == UNSAID:  # the first files; a bias per expert corrects sigmoid scores only
        gating = SIGMOID if metadata.has_tensor_like(r"blk\.\d+\.exp_probs_b\.bias") else SOFTMAX
    if gating not in (SOFTMAX, SIGMOID):
        metadata.unsupported("expert_gating_func", gating, "1 (softmax) or 2 (sigmoid)")
    is_v3 = gating == SIGMOID
    config = common(metadata, "DeepseekV3ForCausalLM" if is_v3 else "DeepseekV2ForCausalLM")
    config |= grouped_experts(metadata, _GROUPS.get((config["num_hidden_layers"], metadata.num_experts())))
    sizes = latent_sizes(metadata)
    rope = rope_parameters(metadata, sizes["qk_rope_head_dim"])
    if rope["rope_type"] == "yarn" and metadata.number("rope.scaling.yarn_log_multiplier", 0.0):
        # 0.1 × mscale_all_dim, in this architecture alone; all published models have an equal mscale.
        scale = float(f"{10 * metadata.number('rope.scaling.yarn_log_multiplier'):.6g}")
        rope |= {"mscale": scale, "mscale_all_dim": scale}
    return config | {
        "num_key_value_heads": config["num_attention_heads"],
        **sizes,
        "rope_parameters": rope,
        "scoring_func": "sigmoid" if is_v3 else "softmax",
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=False),
        "topk_method": "noaux_tc" if is_v3 else "group_limited_greedy" if config["n_group"] > 1 else "greedy",
    }


def latent_sizes(metadata: Metadata, *other_lengths: int) -> Config:
    """Sizes of latent attention.

    Args:
        other_lengths: what may stand in place of the latent vector's under the key for values, which nothing reads.
    """
    rope_dim, latent = metadata.int("rope.dimension_count"), metadata.int("attention.kv_lora_rank")
    # Newer files describe attention as it runs on the latent vector, and the heads under keys of their own.
    is_absorbed = metadata.has("attention.key_length_mla")
    key_dim = metadata.int("attention.key_length_mla" if is_absorbed else "attention.key_length")
    value_dim = metadata.int("attention.value_length_mla" if is_absorbed else "attention.value_length")
    if is_absorbed:
        metadata.expect("attention.key_length", latent + rope_dim)
        metadata.expect("attention.value_length", latent, *other_lengths)
    has_query_rank = metadata.has("attention.q_lora_rank")
    return {
        "q_lora_rank": metadata.int("attention.q_lora_rank") if has_query_rank else None,
        "kv_lora_rank": latent,
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": key_dim - rope_dim,
        "v_head_dim": value_dim,
    }


def _mistral4(metadata: Metadata) -> Config:
    """Mistral Small 4, whose queries grow with their positions as the class has it; converters do not write how."""
    metadata.expect("expert_gating_func", UNSAID, SOFTMAX)
    config = _deepseek2(metadata)
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        metadata.unsupported("rope.scaling.type", metadata.get("rope.scaling.type"), "yarn")
    metadata.expect("attention.temperature_length", rope["original_max_position_embeddings"])
    rope["llama_4_scaling_beta"] = metadata.number("attention.temperature_scale", _BETA)
    return config | {"architectures": ["Mistral4ForCausalLM"]}


def _indexed(metadata: Metadata, architecture: str) -> Config:
    """Latent attention over the positions that an indexer chooses."""
    metadata.expect("expert_gating_func", SIGMOID)
    return _deepseek2(metadata) | {
        "architectures": [architecture],
        "index_n_heads": metadata.int("attention.indexer.head_count"),
        "index_head_dim": metadata.int("attention.indexer.key_length"),
        "index_topk": metadata.int("attention.indexer.top_k"),
    }


def _glm_dsa(metadata: Metadata) -> Config:
    config = _indexed(metadata, "GlmMoeDsaForCausalLM")
    # Files of models that have an indexer in every layer do not say so.
    have_one = metadata.flags("attention.indexer.types", config["num_hidden_layers"], default=True)
    return config | {"indexer_types": ["full" if has_one else "shared" for has_one in have_one]}


def _glm4_moe(metadata: Metadata) -> Config:
    # All models of this architecture have one group, which older converters did not write.
    config = decoder(metadata, "Glm4MoeForCausalLM") | grouped_experts(metadata, (1, 1))
    metadata.expect("expert_gating_func", UNSAID, SIGMOID)
    return config | {
        "norm_topk_prob": metadata.bool("expert_weights_norm", default=True),
        "use_qk_norm": metadata.has_tensor("blk.0.attn_q_norm.weight"),
    }


def _dots1(metadata: Metadata) -> Config:
    # Converters write no window, and none of the models has one.
    return decoder(metadata, "Dots1ForCausalLM") | corrected_experts(metadata) | {"sliding_window": None}


def _exaone_moe(metadata: Metadata) -> Config:
    config = decoder(metadata, "ExaoneMoeForCausalLM") | corrected_experts(metadata)
    shared = config["n_shared_experts"]
    metadata.expect("expert_shared_feed_forward_length", shared * config["moe_intermediate_size"])
    config |= {"num_experts": config["n_routed_experts"], "num_shared_experts": shared}
    window = metadata.int("attention.sliding_window", default=0)
    if not window:
        metadata.unsupported("attention.sliding_window", window, "the window that all models of this architecture have")
    types = metadata.layer_types(config["num_hidden_layers"], default_period=4)
    return config | {"sliding_window": window, "layer_types": types}


ARCHITECTURES: Mapping[str, Builder] = {
    "deepseek2": _deepseek2,
    "deepseek32": lambda metadata: _indexed(metadata, "DeepseekV32ForCausalLM"),
    "glm-dsa": _glm_dsa,
    "glm4moe": _glm4_moe,
    "mistral4": _mistral4,
    "dots1": _dots1,
    "exaone-moe": _exaone_moe,
}
MODEL_TYPES: Mapping[str, str] = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "DeepseekV32ForCausalLM": "deepseek_v32",
    "Mistral4ForCausalLM": "mistral4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "GlmMoeDsaForCausalLM": "glm_moe_dsa",
    "Dots1ForCausalLM": "dots1",
    "ExaoneMoeForCausalLM": "exaone_moe",
}
