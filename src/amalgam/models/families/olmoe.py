"""OLMoE (`OlmoeForCausalLM`): RMSNorm over the whole query and key projections, experts in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from amalgam.kernels.program import Clamp, Emitter, Rows
from amalgam.models.blocks.attention import WholeNormAttention
from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, FUSED_EXPERTS, HEAD_NORMS
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec
from amalgam.models.weights import BlockWeights

NORM_EPS = 1e-5


@dataclass(frozen=True)
class OlmoeAttention(WholeNormAttention):
    """`clip`: queries, keys and values are kept within ±clip; None: as they are."""

    clip: float | None = None

    def project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows]:
        query, key, value = super().project(step, x, weights)
        if self.clip is not None:
            step.add(*(Clamp(rows, self.clip) for rows in (query, key, value)))
        return query, key, value


def _read_spec(config: ConfigReader) -> ModelSpec:
    common = read_attention(config, default_eps=NORM_EPS, has_bias=config.bool("attention_bias", default=False))
    clip = None if config.get("clip_qkv") is None else config.float("clip_qkv")
    attention = OlmoeAttention(**vars(common), clip=clip)
    router = SoftmaxRouter(*read_expert_counts(config), normalises=config.bool("norm_topk_prob", default=False))
    layers = (LayerSpec(attention, SparseMoe(router, config.int("intermediate_size"))),)
    return read_model(config, "olmoe", layers * config.int("num_hidden_layers"), default_eps=NORM_EPS)


FAMILY = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2},
)
