"""DeepSeek-V3 and R1 (`DeepseekV3ForCausalLM`): V2's attention, sigmoid routing with a correction bias per expert.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2. The layers for multi-token prediction are not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from amalgam.kernels.program import Route, Rows
from amalgam.models.families.deepseek_v2 import (
    LATENT_ATTENTION,
    ExpertGroups,
    read_groups,
    read_latent_attention,
    read_moe_layers,
)
from amalgam.models.families.llama import read_model
from amalgam.models.families.mixtral import read_expert_counts
from amalgam.models.naming import DECODER, EXPERTS, FUSED_EXPERTS, MLP, SHARED_EXPERTS
from amalgam.models.spec import ConfigReader, Family, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

CORRECTED_EXPERTS = {
    **EXPERTS,
    **SHARED_EXPERTS,
    "layers.{}.mlp.router_correction": "model.layers.{}.mlp.gate.e_score_correction_bias",
}


@dataclass(frozen=True)
class CorrectedRouter:
    """Sigmoid scores; a bias per expert that balances their load takes part in the choice, but not in the weights.

    Groups score by the sum of their two largest corrected scores.
    """

    num_experts: int
    num_active_experts: int
    groups: ExpertGroups
    normalises: bool
    scaling: float

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")
        yield Slot("router_correction", (self.num_experts,), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        return Route(
            x,
            weights["router"],
            layer_id,
            self.num_active_experts,
            scoring="sigmoid",
            correction=weights["router_correction"].dense,
            num_groups=self.groups.num_groups,
            num_kept=self.groups.num_kept,
            normalises=self.normalises,
            sum_eps=1e-20,
            scaling=self.scaling,
        )


def read_corrected_router(
    config: ConfigReader, *, default_groups: int, default_kept: int, default_scaling: float
) -> CorrectedRouter:
    """The router of DeepSeek-V3 and GLM-4.5."""
    config.expect("scoring_func", "sigmoid")
    config.expect("topk_method", "noaux_tc")
    num_experts, num_active = read_expert_counts(config)
    groups = read_groups(config, default_groups, default_kept)
    if num_experts < 2 * groups.num_groups:
        config.refuse("n_group", groups.num_groups, f"groups of at least two of the {num_experts} experts")
    return CorrectedRouter(
        num_experts,
        num_active,
        groups,
        normalises=config.bool("norm_topk_prob", default=True),
        scaling=config.float("routed_scaling_factor", default=default_scaling),
    )


def with_draft_layers(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """The spec, knowing of the layers for multi-token prediction that checkpoints hold behind the last one."""
    return replace(spec, num_draft_layers=config.int("num_nextn_predict_layers", default=1, low=0))


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_latent_attention(config, is_interleaved=config.bool("rope_interleave", default=True))
    router = read_corrected_router(config, default_groups=8, default_kept=4, default_scaling=2.5)
    layers = read_moe_layers(config, attention, router, default_dense=3, default_shared=1)
    return with_draft_layers(config, read_model(config, "deepseek_v3", layers))


FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **LATENT_ATTENTION, **MLP, **CORRECTED_EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
)
