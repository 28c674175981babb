"""ERNIE 4.5, dense (`Ernie4_5ForCausalLM`): Llama whose rotary pairs are neighbours.

Baidu 2025, "ERNIE 4.5 Technical Report".
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS, THETA = 1e-5, 500000.0


def _read_spec(config: ConfigReader) -> ModelSpec:
    has_bias = config.bool("use_bias", default=False)
    common = read_attention(
        config,
        default_theta=THETA,
        default_head_dim=128,
        default_kv_heads=2,
        default_eps=NORM_EPS,
        has_bias=has_bias,
    )
    layer = LayerSpec(
        replace(common, is_interleaved=True), DenseMlp(config.int("intermediate_size"), has_bias=has_bias)
    )
    layers = (layer,) * config.int("num_hidden_layers")
    return read_model(config, "ernie4_5", layers, default_eps=NORM_EPS, default_tied=True)


FAMILY = Family(
    name="ernie4_5",
    architectures=("Ernie4_5ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 32},
)
