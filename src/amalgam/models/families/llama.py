"""Llama 2 and 3 (`LlamaForCausalLM`): dense, grouped queries, SwiGLU, no biases unless the config says so."""

from __future__ import annotations

from amalgam.models.layers import Attention, DenseMlp, RmsNorm
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.rope import read_rope
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-6


def read_attention(
    config: ConfigReader,
    *,
    default_theta: float = 10000.0,
    default_head_dim: int | None = None,
    default_kv_heads: int | None = None,
    default_eps: float = NORM_EPS,
    default_rotary: float = 1.0,
    has_bias: bool = False,
) -> Attention:
    """The attention that Llama's relatives share; a family changes what differs with `dataclasses.replace`.

    Args:
        default_kv_heads: where the key is missing; None: as many as there are heads, which null means everywhere.
        default_rotary: share of a head that turns. Classes with a default of 1 do not look at `partial_rotary_factor`.
    """
    heads = config.int("num_attention_heads")
    kv_heads = config.int(
        "num_key_value_heads",
        default=heads if default_kv_heads is None or config.is_null("num_key_value_heads") else default_kv_heads,
    )
    head_dim = config.int("head_dim", default=default_head_dim or max(1, config.int("hidden_size") // heads))
    if heads % kv_heads:
        config.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads {heads}")
    return Attention(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=read_rope(config, head_dim, default_theta, default_rotary),
        norm_eps=config.float("rms_norm_eps", default=default_eps, low=0),
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
    )


def read_model(
    config: ConfigReader, family: str, layers: tuple[LayerSpec, ...], *, default_eps: float = NORM_EPS
) -> ModelSpec:
    """The parts of a spec that do not depend on the blocks."""
    config.expect("hidden_act", "silu", "swish")
    return ModelSpec(
        family=family,
        hidden_size=config.int("hidden_size"),
        vocab_size=config.int("vocab_size"),
        max_positions=config.int("max_position_embeddings"),
        norm=RmsNorm(config.float("rms_norm_eps", default=default_eps, low=0)),
        has_tied_head=config.bool("tie_word_embeddings", default=False),
        layers=layers,
    )


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_attention(config, has_bias=config.bool("attention_bias", default=False))
    mlp = DenseMlp(config.int("intermediate_size"), has_bias=config.bool("mlp_bias", default=False))
    return read_model(config, "llama", (LayerSpec(attention, mlp),) * config.int("num_hidden_layers"))


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128},
)
