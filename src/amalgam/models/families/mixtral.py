"""Mixtral (`MixtralForCausalLM`): Mistral's attention, experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, FUSED_NUMBERED_EXPERTS, NUMBERED_EXPERTS
from amalgam.models.reading.attention import read_attention, read_window
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-5


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_attention(config, default_theta=1e6, default_eps=NORM_EPS, default_kv_heads=8)
    attention = replace(attention, window=read_window(config))
    router = SoftmaxRouter(*read_expert_counts(config), normalises=True)
    layers = (LayerSpec(attention, SparseMoe(router, config.int("intermediate_size"))),)
    return read_model(config, "mixtral", layers * config.int("num_hidden_layers"), default_eps=NORM_EPS)


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **NUMBERED_EXPERTS},
    fused=FUSED_NUMBERED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
)
