"""XVERSE (`XverseForCausalLM`): the dense models are Llama's, XVERSE-MoE has experts beside shared ones in every layer.

Both name their `model_type` alike; `num_experts` tells them apart. The router divides by the sum of the chosen
probabilities plus 1e-6, as the publisher's `modeling_xverse.py` does.
"""

from __future__ import annotations

from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, MLP, SHARED_EXPERTS
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_mlp(config: ConfigReader) -> DenseMlp | SparseMoe:
    size = config.int("intermediate_size")
    if config.get("num_experts") is None:
        return DenseMlp(size)
    config.expect("norm_topk_prob", True)
    router = SoftmaxRouter(*read_expert_counts(config, "moe_top_k"), normalises=True, sum_eps=1e-6)
    return SparseMoe(router, size, shared_size=size * config.int("num_shared_experts", low=0))


def _read_spec(config: ConfigReader) -> ModelSpec:
    layer = LayerSpec(read_attention(config), _read_mlp(config))
    return read_model(config, "xverse", (layer,) * config.int("num_hidden_layers"))


FAMILY = Family(
    name="xverse",
    architectures=("XverseForCausalLM",),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        **MLP,
        **EXPERTS,
        **SHARED_EXPERTS,
        "layers.{}.mlp.router": "model.layers.{}.mlp.router.weight",
    },
    tiny_config={
        "intermediate_size": 32,
        "num_experts": 8,
        "moe_top_k": 2,
        "num_shared_experts": 2,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
)
