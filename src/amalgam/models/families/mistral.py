"""Mistral (`MistralForCausalLM`): Llama with a sliding window in every layer, or in none."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.reading.attention import read_attention, read_window
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

WINDOW = 4096  # the configuration class's default, where the key is missing


def _read_spec(config: ConfigReader) -> ModelSpec:
    window = read_window(config, default=WINDOW)
    attention = replace(read_attention(config, default_kv_heads=8), window=window)
    mlp = DenseMlp(config.int("intermediate_size"))
    return read_model(config, "mistral", (LayerSpec(attention, mlp),) * config.int("num_hidden_layers"))


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 32, "sliding_window": 8},
)
