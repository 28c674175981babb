"""Qwen3 (`Qwen3ForCausalLM`): Llama with an RMSNorm on every query and key head."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_attention, read_model
from amalgam.models.families.qwen2 import windowed
from amalgam.models.layers import Attention, DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, HEAD_NORMS, MLP
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

HEAD_DIM = 128  # the configuration class's default, which may be left out of a config.json


def read_qwen3_attention(
    config: ConfigReader, default_head_dim: int | None = None, default_kv_heads: int | None = None
) -> Attention:
    """Qwen3's attention without a window, dense and mixture alike."""
    has_bias = config.bool("attention_bias", default=False)
    common = read_attention(
        config, has_bias=has_bias, default_head_dim=default_head_dim, default_kv_heads=default_kv_heads
    )
    return replace(common, has_head_norm=True)


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_qwen3_attention(config, default_head_dim=HEAD_DIM, default_kv_heads=32)
    mlp = DenseMlp(config.int("intermediate_size"))
    return read_model(config, "qwen3", tuple(LayerSpec(a, mlp) for a in windowed(config, attention)))


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 32},
)
