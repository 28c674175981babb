"""Granite 3 and 4 dense (`GraniteForCausalLM`): Llama with factors on embedding, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_model, with_multipliers
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = replace(
        read_attention(config, has_bias=config.bool("attention_bias", default=False)),
        scale=config.float("attention_multiplier", default=1.0),
    )
    mlp = DenseMlp(config.int("intermediate_size"), has_bias=config.bool("mlp_bias", default=False))
    spec = read_model(config, "granite", (LayerSpec(attention, mlp),) * config.int("num_hidden_layers"))
    return with_multipliers(config, spec)


FAMILY = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
)
