"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): Llama with biases on query, key and value; windows in the upper layers."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.reading.attention import read_attention, windowed
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = replace(read_attention(config, default_kv_heads=32), has_qkv_bias=True)
    mlp = DenseMlp(config.int("intermediate_size"))
    return read_model(config, "qwen2", tuple(LayerSpec(a, mlp) for a in windowed(config, attention)))


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128},
)
