"""Qwen3-Next (`Qwen3NextForCausalLM`): three layers of gated delta net to one of gated attention, experts beside a
gated shared expert."""

from __future__ import annotations

from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.naming import (
    ATTENTION,
    DECODER,
    DELTA_NET,
    EXPERTS,
    FUSED_EXPERTS,
    GATED_SHARED_EXPERT,
    HEAD_NORMS,
    MLP,
)
from amalgam.models.reading.hybrid import read_hybrid_attention, with_qwen_norms
from amalgam.models.reading.layers import read_expert_counts, read_model, read_sparse_layers
from amalgam.models.spec import DRAFT_LAYERS, ConfigReader, Family, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    moe = SparseMoe(
        router=SoftmaxRouter(*read_expert_counts(config), normalises=config.bool("norm_topk_prob", default=True)),
        intermediate_size=config.int("moe_intermediate_size"),
        shared_size=config.int("shared_expert_intermediate_size"),
        has_shared_gate=True,
    )
    attentions = read_hybrid_attention(config, has_groups=True)
    return with_qwen_norms(read_model(config, "qwen3_next", read_sparse_layers(config, attentions, moe)))


FAMILY = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **DELTA_NET, **MLP, **EXPERTS, **GATED_SHARED_EXPERT},
    fused=FUSED_EXPERTS,
    left_out={r"mtp\..*": DRAFT_LAYERS},
    tiny_config={
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [],
    },
)
