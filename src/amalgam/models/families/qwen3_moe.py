"""Qwen3-MoE (`Qwen3MoeForCausalLM`): Qwen3's attention, experts in most layers, a dense MLP in the others.

Its class, unlike Qwen3's, has a window in every layer or in none, and does not look at `max_window_layers`.
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_model
from amalgam.models.families.mixtral import read_expert_counts
from amalgam.models.families.qwen2 import read_used_window
from amalgam.models.families.qwen3 import read_qwen3_attention
from amalgam.models.layers import Attention, DenseMlp, SoftmaxRouter, SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, FUSED_EXPERTS, HEAD_NORMS, MLP
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def is_sparse(config: ConfigReader, layer_id: int) -> bool:
    """Whether a layer has experts: not listed in `mlp_only_layers`, and every `decoder_sparse_step`-th."""
    step = config.int("decoder_sparse_step", default=1)
    dense = config.get("mlp_only_layers", default=[])
    if not isinstance(dense, list):
        config.refuse("mlp_only_layers", dense, "a list of layer numbers")
    return layer_id not in dense and (layer_id + 1) % step == 0


def read_sparse_layers(
    config: ConfigReader, attentions: tuple[Attention, ...], moe: SparseMoe
) -> tuple[LayerSpec, ...]:
    """`moe` in the layers that have experts, a dense MLP in the others."""
    dense = DenseMlp(config.int("intermediate_size"))
    return tuple(
        LayerSpec(attention, moe if is_sparse(config, layer_id) else dense)
        for layer_id, attention in enumerate(attentions)
    )


def _read_spec(config: ConfigReader) -> ModelSpec:
    router = SoftmaxRouter(*read_expert_counts(config), normalises=config.bool("norm_topk_prob", default=False))
    moe = SparseMoe(router, config.int("moe_intermediate_size"))
    attention = replace(read_qwen3_attention(config, default_kv_heads=4), window=read_used_window(config))
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
