"""Seed-OSS (`SeedOssForCausalLM`): Llama with biases on query, key and value."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = replace(
        read_attention(config, default_head_dim=128, default_kv_heads=8),
        has_qkv_bias=config.bool("attention_bias", default=True),
        has_output_bias=config.bool("attention_out_bias", default=False),
    )
    mlp = DenseMlp(config.int("intermediate_size"), has_bias=config.bool("mlp_bias", default=False))
    return read_model(config, "seed_oss", (LayerSpec(attention, mlp),) * config.int("num_hidden_layers"))


FAMILY = Family(
    name="seed_oss",
    architectures=("SeedOssForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 32},
)
