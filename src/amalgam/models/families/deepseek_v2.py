"""DeepSeek-V2 (`DeepseekV2ForCausalLM`): latent attention, group-limited routing, shared experts, first layers dense.

DeepSeek-AI 2024, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amalgam.kernels.program import Route, Rows
from amalgam.models.blocks.mixture import ExpertGroups
from amalgam.models.naming import DECODER, EXPERTS, FUSED_EXPERTS, LATENT_ATTENTION, MLP, SHARED_EXPERTS
from amalgam.models.reading.attention import read_latent_attention
from amalgam.models.reading.layers import read_expert_counts, read_groups, read_model, read_moe_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec, Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class GroupLimitedRouter:
    """Softmax over all experts; the top k, from the groups with the largest single probabilities (section 2.2.2)."""

    num_experts: int
    num_active_experts: int
    groups: ExpertGroups
    scaling: float

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        return Route(
            x,
            weights["router"],
            layer_id,
            self.num_active_experts,
            num_groups=self.groups.num_groups,
            num_kept=self.groups.num_kept,
            scaling=self.scaling,
        )


def _read_router(config: ConfigReader) -> GroupLimitedRouter:
    config.expect("scoring_func", "softmax")
    # The published code then normalises or scales, never both; today's class always scales. Nobody publishes it.
    config.expect("norm_topk_prob", False)
    config.expect("topk_method", "greedy", "group_limited_greedy")
    is_grouped = config.get("topk_method") == "group_limited_greedy"
    return GroupLimitedRouter(
        *read_expert_counts(config),
        groups=read_groups(config, 1, 1) if is_grouped else ExpertGroups(1, 1),
        scaling=config.float("routed_scaling_factor", default=1.0),
    )


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_latent_attention(config, is_interleaved=True)
    layers = read_moe_layers(config, attention, _read_router(config), default_dense=0, default_shared=2)
    return read_model(config, "deepseek_v2", layers)


FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **LATENT_ATTENTION, **MLP, **EXPERTS, **SHARED_EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
)
