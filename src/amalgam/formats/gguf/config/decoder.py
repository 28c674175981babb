"""What decoders have in common: sizes, norms, heads and positions."""

from __future__ import annotations

from amalgam.base.fields import REQUIRED
from amalgam.formats.gguf.config.metadata import Config, Metadata
from amalgam.formats.gguf.config.rope import rope_parameters

_WITHOUT_MLP = {"Qwen3_5MoeForCausalLM"}


def common(
    metadata: Metadata, architecture: str, norm_key: str = "layer_norm_rms_epsilon", kv_heads: int | None = None
) -> Config:
    """What all but GPT-2 share, without the head's size; `kv_heads` where not all layers have them."""
    heads = metadata.int("attention.head_count")
    return {
        "architectures": [architecture],
        "hidden_size": metadata.int("embedding_length"),
        "num_hidden_layers": metadata.num_layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or metadata.int("attention.head_count_kv", default=heads),
        "intermediate_size": metadata.int(
            "feed_forward_length", default=None if architecture in _WITHOUT_MLP else REQUIRED
        ),
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number(f"attention.{norm_key}"),
        "max_position_embeddings": metadata.int("context_length"),
        "vocab_size": metadata.num_rows("token_embd.weight"),
        "tie_word_embeddings": not metadata.has_tensor("output.weight"),
        "attention_bias": metadata.has_tensor("blk.0.attn_q.bias"),
    }


def decoder(
    metadata: Metadata, architecture: str, norm_key: str = "layer_norm_rms_epsilon", kv_heads: int | None = None
) -> Config:
    """`common`, with heads of one size and rotary positions."""
    config = common(metadata, architecture, norm_key, kv_heads)
    heads = config["num_attention_heads"]
    head_dim = metadata.int("attention.key_length", default=config["hidden_size"] // max(heads, 1))
    metadata.expect("attention.value_length", head_dim)
    rotary_dim = metadata.int("rope.dimension_count", default=head_dim)
    if not 0 < rotary_dim <= head_dim:
        metadata.refuse("rope.dimension_count", rotary_dim, f"1 to {head_dim}, the size of a head")
    config |= {"head_dim": head_dim, "rope_parameters": rope_parameters(metadata, rotary_dim)}
    if rotary_dim != head_dim:
        config["rope_parameters"]["rotary_dim"] = rotary_dim
    return config
