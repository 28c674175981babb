"""Qwen3 (`Qwen3ForCausalLM`): Llama with an RMSNorm on every query and key head."""

from __future__ import annotations

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, HEAD_NORMS, MLP
from amalgam.models.reading.attention import read_normed_attention, windowed
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

HEAD_DIM = 128  # the configuration class's default, which may be left out of a config.json


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_normed_attention(config, default_head_dim=HEAD_DIM, default_kv_heads=32)
    mlp = DenseMlp(config.int("intermediate_size"))
    return read_model(config, "qwen3", tuple(LayerSpec(a, mlp) for a in windowed(config, attention)))


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 32},
)
