"""Llama 2 and 3 (`LlamaForCausalLM`): dense, grouped queries, SwiGLU, no biases unless the config says so."""

from __future__ import annotations

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


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
