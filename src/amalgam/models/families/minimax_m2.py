"""MiniMax-M2 (`MiniMaxM2ForCausalLM`): norms over whole projections, part of a head turns, corrected sigmoid routing.

The layers for multi-token prediction are not loaded.
"""

from __future__ import annotations

from amalgam.models.blocks.attention import WholeNormAttention
from amalgam.models.blocks.mixture import CorrectedRouter, SparseMoe
from amalgam.models.naming import (
    ATTENTION,
    DECODER,
    FUSED_NUMBERED_EXPERTS,
    HEAD_NORMS,
    NUMBERED_EXPERTS,
    renamed_tensor,
)
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

HEAD_DIM = 128  # the configuration class's default, which may be left out of a config.json


def _rotary_share(config: ConfigReader) -> float:
    """Published files say it as `rotary_dim`, in dimensions of a head; a share in the rope settings counts before."""
    head_dim = config.int("head_dim", default=HEAD_DIM)
    return config.int("rotary_dim", default=head_dim) / head_dim


def _read_spec(config: ConfigReader) -> ModelSpec:
    config.expect("scoring_func", "sigmoid")
    config.expect("use_qk_norm", True)
    config.expect("qk_norm_type", "per_layer")
    config.expect("use_routing_bias", True)
    config.expect("shared_intermediate_size", 0)
    config.expect("sliding_window", None)
    kinds = config.list("attn_type_list", of=int, what="numbers", default=[])
    if set(kinds) - {1}:
        config.refuse("attn_type_list", kinds, "1, full attention, for each layer")
    common = read_attention(
        config,
        default_theta=5e6,
        default_head_dim=HEAD_DIM,
        default_kv_heads=8,
        default_rotary=_rotary_share(config),
    )
    router = CorrectedRouter(*read_expert_counts(config), sum_eps=0.0)
    layer = LayerSpec(WholeNormAttention(**vars(common)), SparseMoe(router, config.int("intermediate_size")))
    return read_model(config, "minimax_m2", (layer,) * config.int("num_hidden_layers"))


_CORRECTION = "model.layers.{}.block_sparse_moe.e_score_correction_bias"

FAMILY = Family(
    name="minimax_m2",
    architectures=("MiniMaxM2ForCausalLM",),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        **HEAD_NORMS,
        **NUMBERED_EXPERTS,
        "layers.{}.mlp.router_correction": _CORRECTION,
    },
    # The last one as transformers 5 has it.
    fused=(*FUSED_NUMBERED_EXPERTS, renamed_tensor("model.layers.{}.mlp.e_score_correction_bias", _CORRECTION)),
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "rotary_dim": 16,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
)
