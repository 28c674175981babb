"""Qwen3 (`Qwen3ForCausalLM`): Llama with an RMSNorm on every query and key head."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_attention, read_model
from amalgam.models.families.qwen2 import windowed
from amalgam.models.layers import Attention, DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, HEAD_NORMS, MLP
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

HEAD_DIM = 128  # the configuration class's default, which may be left out of a config.json


def read_qwen3_attention(config: ConfigReader) -> tuple[Attention, ...]:
    """Qwen3's attention of each layer, dense and mixture alike."""
    has_bias = config.bool("attention_bias", default=False)
    attention = replace(read_attention(config, has_bias=has_bias, default_head_dim=HEAD_DIM), has_head_norm=True)
    return windowed(config, attention)


def _read_spec(config: ConfigReader) -> ModelSpec:
    mlp = DenseMlp(config.int("intermediate_size"))
    return read_model(config, "qwen3", tuple(LayerSpec(a, mlp) for a in read_qwen3_attention(config)))


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 32},
)
