"""Gemma 4, dense or with experts: layers of two kinds of attention, with sizes of their own."""

from __future__ import annotations

from collections.abc import Mapping

from amalgam.formats.gguf.config.experts import softmax_experts
from amalgam.formats.gguf.config.metadata import Builder, Config, Metadata


def _gemma4(metadata: Metadata) -> Config:
    num_layers = metadata.num_layers()
    types = metadata.layer_types(num_layers, default_period=6)

    def of_type(kind: str, values: list[int], key: str) -> int | None:
        found = {value for value, one in zip(values, types, strict=True) if one == kind}
        if len(found) > 1:
            metadata.unsupported(key, values, "the same number for all layers of a type")
        return found.pop() if found else None

    kv_key, size_key = "attention.head_count_kv", "feed_forward_length"
    kv_heads, sizes = metadata.per_layer(kv_key, num_layers), metadata.per_layer(size_key, num_layers)
    shared = metadata.int("attention.shared_kv_layers", default=0, low=0)
    first = max(num_layers - shared, 0)
    factor = sizes[-1] // max(sizes[0], 1)
    if sizes != sizes[:1] * first + [factor * sizes[0]] * (num_layers - first) or factor not in (1, 2):
        metadata.unsupported(size_key, sizes, "the same in all layers, or twice as much in those that share keys")
    full_dim, local_dim = metadata.int("attention.key_length"), metadata.int("attention.key_length_swa")
    for key, dim in (("", full_dim), ("_swa", local_dim)):
        metadata.expect(f"attention.value_length{key}", dim)
        metadata.expect(f"rope.dimension_count{key}", dim)
    owners = [layer for layer, kind in enumerate(types[:first]) if kind == "full_attention"]
    config: Config = {
        "architectures": ["Gemma4ForCausalLM"],
        "hidden_size": metadata.int("embedding_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": metadata.int("attention.head_count"),
        "num_key_value_heads": of_type("sliding_attention", kv_heads, kv_key) or kv_heads[0],
        "num_global_key_value_heads": of_type("full_attention", kv_heads, kv_key),
        "head_dim": local_dim,
        "global_head_dim": full_dim,
        "attention_k_eq_v": bool(owners) and not metadata.has_tensor(f"blk.{owners[0]}.attn_v.weight"),
        "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
        "num_kv_shared_layers": shared,
        "layer_types": types,
        "sliding_window": metadata.int("attention.sliding_window"),
        "intermediate_size": sizes[0],
        "use_double_wide_mlp": factor == 2,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.int("context_length"),
        "vocab_size": metadata.num_rows("token_embd.weight"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 0.0) or None,
        "hidden_size_per_layer_input": metadata.int("embedding_length_per_layer_input", default=0, low=0),
        "rope_parameters": {
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": metadata.number("rope.freq_base_swa", 10000.0),
            },
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": metadata.number("rope.freq_base", 1000000.0),
                "partial_rotary_factor": _turning_share(metadata, full_dim),
            },
        },
    }
    if config["hidden_size_per_layer_input"]:
        config["vocab_size_per_layer_input"] = metadata.num_rows("per_layer_token_embd.weight")
    if metadata.int("expert_count", default=0, low=0):
        experts = softmax_experts(metadata)
        size = metadata.width("expert_feed_forward_length", "ffn_gate(_up)?_exps")
        config |= {"enable_moe_block": True, "num_experts": experts["num_experts"], "moe_intermediate_size": size}
        config["top_k_experts"] = experts["num_experts_per_tok"]
    return config


def _turning_share(metadata: Metadata, head_dim: int) -> float:
    """What share of a head's pairs turns: `rope_freqs` divides the others' frequencies by 1e30."""
    if not metadata.has_tensor("rope_freqs.weight"):
        return 1.0
    divisors = metadata.small_tensor("rope_freqs.weight")
    turning = divisors.count(1.0)
    if (
        len(divisors) != head_dim // 2
        or divisors[:turning] != [1.0] * turning
        or min(divisors[turning:], default=1e30) < 1e29
    ):
        metadata.unsupported(
            "rope_freqs.weight", divisors, f"{head_dim // 2} numbers: 1 first, 1e30 for what stands still"
        )
    return turning / len(divisors)


ARCHITECTURES: Mapping[str, Builder] = {"gemma4": _gemma4}
MODEL_TYPES: Mapping[str, str] = {"Gemma4ForCausalLM": "gemma4_text"}
