"""What Gemma 2 and 3 have in common: norms before and behind each block, whose weights are stored without their 1;
GEGLU; a scaled embedding; scores that are scaled by a number of their own."""

from __future__ import annotations

from dataclasses import replace

from amalgam.kernels.weights import GEGLU
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.reading.attention import NORM_EPS, read_attention
from amalgam.models.reading.layers import GELU, read_model
from amalgam.models.spec import ConfigReader, LayerSpec, ModelSpec, Norms


def read_gemma_attention(
    config: ConfigReader,
    *,
    default_theta: float = 10000.0,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
) -> Attention:
    """The attention of all layers, or of those of a type (see `read_rope`), without windows."""
    config.expect("use_bidirectional_attention", False)
    common = read_attention(
        config,
        default_theta=default_theta,
        default_head_dim=256,
        default_kv_heads=4,
        has_bias=config.bool("attention_bias", default=False),
        layer_type=layer_type,
        theta_key=theta_key,
    )
    return replace(common, scale=config.float("query_pre_attn_scalar", default=256.0, low=1) ** -0.5)


def read_gemma(
    config: ConfigReader, family: str, attentions: tuple[Attention, ...], *, default_softcap: float | None
) -> ModelSpec:
    """A whole model."""
    mlp = DenseMlp(config.int("intermediate_size"), activation=GEGLU)
    layers = tuple(LayerSpec(attention, mlp) for attention in attentions)
    spec = read_model(config, family, layers, default_tied=True, activations=GELU, activation_key="hidden_activation")
    return replace(
        spec,
        norm=RmsNorm(config.float("rms_norm_eps", default=NORM_EPS, low=0), rounds_last=True, adds_one=True),
        norms=Norms.AROUND,
        embedding_scale=spec.hidden_size**0.5,
        rounds_embedding_scale=True,
        logits_softcap=read_softcap(config, "final_logit_softcapping", default_softcap),
    )


def read_softcap(config: ConfigReader, key: str, default: float | None) -> float | None:
    """None where there is none; so says null, too."""
    value = None if config.is_null(key) else config.float(key, default=default)
    if value is not None and value <= 0:
        config.refuse(key, value, "a number above 0, or null")
    return value
