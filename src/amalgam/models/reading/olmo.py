"""What OLMo 2 and 3 have in common."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.attention import Attention, WholeNormAttention
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, LayerSpec, ModelSpec, Norms

_NORM_EPS = 1e-5


def read_olmo_attention(
    config: ConfigReader, *, default_theta: float = 10000.0, layer_type: str | None = None
) -> WholeNormAttention:
    """The attention of all layers, or of those of a type (see `read_rope`), without windows."""
    common = read_attention(
        config,
        default_theta=default_theta,
        default_eps=_NORM_EPS,
        has_bias=config.bool("attention_bias", default=False),
        layer_type=layer_type,
    )
    return WholeNormAttention(**vars(common), rounds_last=True)


def read_olmo(config: ConfigReader, family: str, attentions: tuple[Attention, ...]) -> ModelSpec:
    """A whole model: norms behind the blocks."""
    mlp = DenseMlp(config.int("intermediate_size"))
    spec = read_model(config, family, tuple(LayerSpec(attention, mlp) for attention in attentions))
    norm = RmsNorm(config.float("rms_norm_eps", default=_NORM_EPS, low=0), rounds_last=True)
    return replace(spec, norm=norm, norms=Norms.BEHIND)
