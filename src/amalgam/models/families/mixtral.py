"""Mixtral (`MixtralForCausalLM`): Mistral's attention, experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_attention, read_model
from amalgam.models.families.mistral import read_window
from amalgam.models.layers import SoftmaxRouter, SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, FUSED_NUMBERED_EXPERTS, NUMBERED_EXPERTS
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-5


def read_expert_counts(config: ConfigReader, active_key: str = "num_experts_per_tok") -> tuple[int, int]:
    """Experts of a layer, and how many of them a token goes to, which is `active_key`."""
    num_experts = config.int("num_experts", "num_local_experts", "n_routed_experts")
    num_active = config.int(active_key)
    if num_active > num_experts:
        config.refuse(active_key, num_active, f"at most the {num_experts} experts of a layer")
    return num_experts, num_active


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
