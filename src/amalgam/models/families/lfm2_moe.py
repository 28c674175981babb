"""LFM2 and LFM2.5 with experts (`Lfm2MoeForCausalLM`): short gated convolutions beside attention, dense MLPs in the
first layers, then experts by sigmoid scores."""

from __future__ import annotations

from amalgam.models.blocks.mixture import CorrectedRouter, SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import fused_experts
from amalgam.models.reading.layers import read_expert_counts
from amalgam.models.reading.lfm2 import LFM2, read_lfm2_attention, read_lfm2_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    router = CorrectedRouter(
        *read_expert_counts(config, default_experts=32, default_active=4),
        normalises=config.bool("norm_topk_prob", default=True),
        scaling=config.float("routed_scaling_factor", default=1.0),
        sum_eps=1e-6,
        has_correction=config.bool("use_expert_bias", default=True),
    )
    moe = SparseMoe(router, config.int("moe_intermediate_size", default=1792))
    dense = DenseMlp(config.int("intermediate_size", default=7168))
    num_dense = config.int("num_dense_layers", default=2, low=0)
    layers = tuple(
        LayerSpec(attention, dense if layer_id < num_dense else moe)
        for layer_id, attention in enumerate(read_lfm2_attention(config))
    )
    return read_lfm2_model(config, "lfm2_moe", layers)


_MIXTURE = "model.layers.{}.feed_forward"
_EXPERT, _PARTS = f"{_MIXTURE}.experts.{{}}", {"gate": "w1", "up": "w3", "down": "w2"}

FAMILY = Family(
    name="lfm2_moe",
    architectures=("Lfm2MoeForCausalLM",),
    read_spec=_read_spec,
    names={
        **LFM2,
        "layers.{}.mlp.router": f"{_MIXTURE}.gate.weight",
        "layers.{}.mlp.router_correction": f"{_MIXTURE}.expert_bias",
        **{f"layers.{{}}.mlp.experts.{{}}.{part}": f"{_EXPERT}.{name}.weight" for part, name in _PARTS.items()},
    },
    fused=fused_experts(_EXPERT, ("w1", "w3", "w2"), stored=f"{_MIXTURE}.experts"),
    tiny_config={
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "routed_scaling_factor": 1.5,
    },
)
