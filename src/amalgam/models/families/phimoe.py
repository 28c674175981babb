"""Phi-3.5-MoE (`PhimoeForCausalLM`): LayerNorm, biases, two experts chosen one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from amalgam.kernels.program import Route, Rows
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.norms import LayerNorm
from amalgam.models.naming import ATTENTION, DECODER, FUSED_NUMBERED_EXPERTS, NUMBERED_EXPERTS, with_biases
from amalgam.models.reading.attention import read_attention, read_window
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.reading.rope import RopeSettings
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

NORM_EPS = 1e-5


@dataclass(frozen=True)
class SparseMixer:
    """The best expert, then the best of the others (Liu et al. 2024, "GRIN: GRadient-INformed MoE").

    Each is weighted by a softmax over the candidates within a relative distance of `2 × jitter` of it; the two weights
    do not sum to 1.
    """

    num_experts: int
    jitter: float
    num_active_experts: int = 2

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        k, jitter = self.num_active_experts, self.jitter
        return Route(x, weights["router"], layer_id, k, scoring="mixer", jitter=jitter)


def _read_spec(config: ConfigReader) -> ModelSpec:
    kind = RopeSettings(config).kind
    if kind not in ("default", "longrope"):
        config.refuse("rope_type", kind, "default or longrope for this family")
    attention = read_attention(
        config,
        default_theta=1e6,
        default_eps=NORM_EPS,
        default_kv_heads=8,
        has_bias=config.bool("attention_bias", default=False),
    )
    attention = replace(attention, window=read_window(config))
    num_experts, num_active = read_expert_counts(config)
    router = SparseMixer(num_experts, jitter=config.float("router_jitter_noise", default=0.01))
    if num_active != router.num_active_experts:
        config.refuse("num_experts_per_tok", num_active, "2: the router makes two choices")
    layers = (LayerSpec(attention, SparseMoe(router, config.int("intermediate_size"))),)
    return replace(
        read_model(config, "phimoe", layers * config.int("num_hidden_layers")),
        norm=LayerNorm(config.float("rms_norm_eps", default=NORM_EPS, low=0)),
        has_head_bias=config.bool("lm_head_bias", default=False),
    )


FAMILY = Family(
    name="phimoe",
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM"),
    read_spec=_read_spec,
    names={**with_biases(DECODER), **ATTENTION, **NUMBERED_EXPERTS},
    fused=FUSED_NUMBERED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.3,
    },
)
