"""Mixtral (`MixtralForCausalLM`): Llama's attention, experts in every layer; w1 is gate, w3 up, w2 down."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_attention, read_model
from amalgam.models.layers import SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, fused_experts
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec
from amalgam.precision.fused import FusedTensor

NORM_EPS = 1e-5
_MOE = "model.layers.{}.block_sparse_moe"


def _read_spec(config: ConfigReader) -> ModelSpec:
    norm_eps = config.float("rms_norm_eps", default=NORM_EPS)
    window = config.get("sliding_window")
    attention = replace(
        read_attention(config, default_theta=1e6),
        norm_eps=norm_eps,
        window=None if window is None else config.int("sliding_window"),
    )
    num_experts = config.int("num_local_experts", "num_experts")
    moe = SparseMoe(
        num_experts=num_experts,
        num_active_experts=config.int("num_experts_per_tok"),
        intermediate_size=config.int("intermediate_size"),
        normalises=True,
    )
    if moe.num_active_experts > num_experts:
        config.refuse("num_experts_per_tok", moe.num_active_experts, f"at most num_local_experts {num_experts}")
    layers = (LayerSpec(attention, moe),) * config.int("num_hidden_layers")
    return replace(read_model(config, "mixtral", layers), norm_eps=norm_eps)


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        "layers.{}.mlp.router": f"{_MOE}.gate.weight",
        **{
            f"layers.{{}}.mlp.experts.{{}}.{part}": f"{_MOE}.experts.{{}}.{published}.weight"
            for part, published in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
        },
    },
    fused=(
        *fused_experts(f"{_MOE}.experts.{{}}", "w1", "w3", "w2"),
        FusedTensor("model.layers.{}.mlp.gate", (f"{_MOE}.gate",), is_stacked=False),
    ),
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
)
