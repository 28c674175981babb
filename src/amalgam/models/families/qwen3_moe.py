"""Qwen3-MoE (`Qwen3MoeForCausalLM`): Qwen3's attention, experts in most layers, a dense MLP in the others.

Its class, unlike Qwen3's, has a window in every layer or in none, and does not look at `max_window_layers`.
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, FUSED_EXPERTS, HEAD_NORMS, MLP
from amalgam.models.reading.attention import read_normed_attention, read_used_window
from amalgam.models.reading.layers import read_expert_counts, read_model, read_sparse_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    router = SoftmaxRouter(*read_expert_counts(config), normalises=config.bool("norm_topk_prob", default=False))
    moe = SparseMoe(router, config.int("moe_intermediate_size"))
    attention = replace(read_normed_attention(config, default_kv_heads=4), window=read_used_window(config))
    attentions = (attention,) * config.int("num_hidden_layers")
    return read_model(config, "qwen3_moe", read_sparse_layers(config, attentions, moe))


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **MLP, **EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
)
