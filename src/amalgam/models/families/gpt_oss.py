"""gpt-oss (`GptOssForCausalLM`): attention sinks, windows in every other layer, clamped experts with biases.

The published tensors hold all experts of a layer; they are named one by one here, as `precision` presents them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from amalgam.kernels.program import Route, Rows
from amalgam.kernels.weights import GatedActivation
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, FUSED_ALTERNATING_EXPERTS, with_biases
from amalgam.models.reading.attention import by_layer_type, read_attention, read_window
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

NORM_EPS = 1e-5


@dataclass(frozen=True)
class SinkAttention(Attention):
    """Each head may attend to nothing, by a learned logit."""

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield from super().slots(hidden_size)
        yield Slot("sinks", (self.num_heads,), "bias")


@dataclass(frozen=True)
class TopSoftmaxRouter:
    """The k largest logits, and a softmax over those alone."""

    num_experts: int
    num_active_experts: int

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")
        yield Slot("router_bias", (self.num_experts,), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        router, bias = weights["router"], weights.vector("router_bias")
        return Route(x, router, layer_id, self.num_active_experts, scoring="chosen", bias=bias)


def _read_spec(config: ConfigReader) -> ModelSpec:
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config.refuse("rope_parameters", None, "the rope settings that the model was trained with")
    common = read_attention(
        config,
        default_theta=150000.0,
        default_head_dim=64,
        default_kv_heads=8,
        default_eps=NORM_EPS,
        has_bias=config.bool("attention_bias", default=True),
    )
    moe = SparseMoe(
        router=TopSoftmaxRouter(*read_expert_counts(config)),
        intermediate_size=config.int("intermediate_size"),
        activation=GatedActivation(
            alpha=config.float("swiglu_alpha", default=1.702),
            offset=1.0,
            limit=config.float("swiglu_limit", default=7.0),
        ),
        has_bias=True,
    )
    types = [f"{('sliding', 'full')[i % 2]}_attention" for i in range(config.int("num_hidden_layers"))]
    window = read_window(config, default=128)
    attentions = by_layer_type(config, SinkAttention(**vars(common)), window, types)
    spec = read_model(config, "gpt_oss", tuple(LayerSpec(attention, moe) for attention in attentions))
    return replace(spec, norm=RmsNorm(config.float("rms_norm_eps", default=NORM_EPS, low=0), rounds_last=True))


FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        "layers.{}.attention.sinks": "model.layers.{}.self_attn.sinks",
        **with_biases({**EXPERTS, "layers.{}.mlp.router": "model.layers.{}.mlp.router.weight"}),
    },
    fused=FUSED_ALTERNATING_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
)
