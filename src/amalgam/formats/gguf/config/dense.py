"""Architectures whose layers all have one MLP, and Mixtral, which shares a name with Llama."""

from __future__ import annotations

import math
from collections.abc import Mapping

from amalgam.formats.gguf.config.decoder import decoder
from amalgam.formats.gguf.config.experts import softmax_experts
from amalgam.formats.gguf.config.metadata import Builder, Config, Metadata

_YARN_FACTORS = ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor")


def _plain(architecture: str) -> Builder:
    return lambda metadata: decoder(metadata, architecture)


def _llama(metadata: Metadata) -> Config:
    window = metadata.int("attention.sliding_window", default=0) or None
    if not metadata.int("expert_count", default=0):
        config = decoder(metadata, "LlamaForCausalLM")
        config["mlp_bias"] = metadata.has_tensor("blk.0.ffn_gate.bias")
        if window is not None:
            config |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
        return config
    config = decoder(metadata, "MixtralForCausalLM") | softmax_experts(metadata)
    metadata.expect("expert_weights_norm", True)
    return config | {"sliding_window": window}


def _gemma(metadata: Metadata, architecture: str, largest: int, period: int) -> Config:
    """Gemma 2 and 3. The largest model of each, told by its number of layers, scales its scores by hidden size per head
    and all others by the size of a head, as llama.cpp has it; no key says so."""
    config = decoder(metadata, architecture)
    num_layers = config["num_hidden_layers"]
    metadata.expect_pattern(period, num_layers)
    is_largest = num_layers == largest
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if is_largest else config["head_dim"],
        "sliding_window": metadata.int("attention.sliding_window"),
        "layer_types": [
            f"{'full' if (layer + 1) % period == 0 else 'sliding'}_attention" for layer in range(num_layers)
        ],
        **{key: metadata.number(key, 0.0) or None for key in ("attn_logit_softcapping", "final_logit_softcapping")},
    }


def _gemma3(metadata: Metadata) -> Config:
    config = _gemma(metadata, "Gemma3ForCausalLM", 62, 6)
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    return config | {"rope_parameters": {"full_attention": config["rope_parameters"], "sliding_attention": local}}


def _phi3(metadata: Metadata) -> Config:
    config = decoder(metadata, "Phi3ForCausalLM")
    trained = metadata.int("rope.scaling.original_context_length", default=config["max_position_embeddings"])
    return config | {
        "sliding_window": metadata.int("attention.sliding_window", default=0) or None,
        "original_max_position_embeddings": trained,
    }


def _olmo2(metadata: Metadata) -> Config:
    """OLMo 3 where there is a window; its scaling is of the layers without one."""
    config = decoder(metadata, "Olmo2ForCausalLM")
    window = metadata.int("attention.sliding_window", default=0)
    if not window:
        return config
    num_layers, rope = config["num_hidden_layers"], config["rope_parameters"]
    metadata.expect_pattern(4, num_layers)
    if rope["rope_type"] == "yarn" and rope["factor"] > 1:
        # What config.json calls `attention_factor`, under today's key or the older one; 1 says nothing. Nor does the
        # class's default, which float32 has rounded.
        written, default = metadata.number(metadata.present(*_YARN_FACTORS), 1.0), 0.1 * math.log(rope["factor"]) + 1
        if written != 1.0 and not math.isclose(written, default, rel_tol=1e-6):
            rope["attention_factor"] = written
    return config | {
        "architectures": ["Olmo3ForCausalLM"],
        "sliding_window": window,
        "layer_types": [f"{'full' if (layer + 1) % 4 == 0 else 'sliding'}_attention" for layer in range(num_layers)],
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": rope["rope_theta"]},
        },
    }


def _smollm3(metadata: Metadata) -> Config:
    # Every fourth layer without positions, told by the architecture.
    config = decoder(metadata, "SmolLM3ForCausalLM")
    return config | {"no_rope_layer_interval": 4, "mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias")}


def _seed_oss(metadata: Metadata) -> Config:
    return decoder(metadata, "SeedOssForCausalLM") | {
        "attention_out_bias": metadata.has_tensor("blk.0.attn_output.bias"),
        "mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias"),
    }


def _mistral3(metadata: Metadata) -> Config:
    """Ministral 3; Mistral Small 3.1 and 3.2 are of this architecture, too, without a scale that grows."""
    config = decoder(metadata, "Ministral3ForCausalLM")
    config["sliding_window"] = metadata.int("attention.sliding_window", default=0) or None
    beta = metadata.number("attention.temperature_scale", 0.0)
    if not beta:
        return config | {"architectures": ["MistralForCausalLM"]}
    rope = config["rope_parameters"]
    if rope["rope_type"] != "yarn":
        metadata.unsupported("rope.scaling.type", rope["rope_type"], "yarn, where attention.temperature_scale is")
    metadata.expect("attention.temperature_length", rope["original_max_position_embeddings"])
    # All published models have an equal mscale.
    scale = metadata.number("rope.scaling.yarn_log_multiplier", 1.0)
    rope |= {"mscale": scale, "mscale_all_dim": scale, "llama_4_scaling_beta": beta}
    return config


def _ernie4_5(metadata: Metadata) -> Config:
    config = decoder(metadata, "Ernie4_5ForCausalLM")
    return config | {"use_bias": config["attention_bias"]}


def granite(metadata: Metadata, kv_heads: int | None = None) -> Config:
    if kv_heads is None:  # what other architectures note by the way is to Granite's whether to rotate at all
        metadata.expect("rope.scaling.finetuned", True)
    config = decoder(metadata, "GraniteForCausalLM", kv_heads=kv_heads)
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    config |= {name: metadata.number(key, 1.0) for name, key in keys.items()}
    return config | {"mlp_bias": metadata.has_tensor("blk.0.ffn_gate.bias")}


def _starcoder2(metadata: Metadata) -> Config:
    config = decoder(metadata, "Starcoder2ForCausalLM", "layer_norm_epsilon")
    return config | {
        "norm_epsilon": config["rms_norm_eps"],
        "hidden_act": "gelu_pytorch_tanh",
        "use_bias": config["attention_bias"],
        # Converters do not write it; it is 4096 in all models.
        "sliding_window": metadata.int("attention.sliding_window", default=4096),
    }


def _gpt2(metadata: Metadata) -> Config:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": metadata.int("embedding_length"),
        "n_layer": metadata.num_layers(),
        "n_head": metadata.int("attention.head_count"),
        "n_positions": metadata.int("context_length"),
        "n_inner": metadata.int("feed_forward_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "vocab_size": metadata.num_rows("token_embd.weight"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
    }


ARCHITECTURES: Mapping[str, Builder] = {
    "llama": _llama,
    "xverse": _plain("XverseForCausalLM"),
    "qwen2": _plain("Qwen2ForCausalLM"),
    "qwen3": _plain("Qwen3ForCausalLM"),
    "gemma2": lambda metadata: _gemma(metadata, "Gemma2ForCausalLM", 46, 2),
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "seed_oss": _seed_oss,
    "mistral3": _mistral3,
    "ernie4_5": _ernie4_5,
    "granite": granite,
    "starcoder2": _starcoder2,
    "gpt2": _gpt2,
}
MODEL_TYPES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "MixtralForCausalLM": "mixtral",
    "XverseForCausalLM": "xverse",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo3",
    "SmolLM3ForCausalLM": "smollm3",
    "SeedOssForCausalLM": "seed_oss",
    "Ministral3ForCausalLM": "ministral3",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "GraniteForCausalLM": "granite",
    "Starcoder2ForCausalLM": "starcoder2",
    "GPT2LMHeadModel": "gpt2",
}
