"""ERNIE 4.5, mixtures (`Ernie4_5_MoeForCausalLM`): rotary pairs are neighbours, softmax routing with a correction.

Baidu 2025, "ERNIE 4.5 Technical Report". The layers for multi-token prediction are not loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from amalgam.kernels.program import Route, Rows
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, FUSED_EXPERTS, MLP, SHARED_EXPERTS, renamed_tensor
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_expert_counts, read_model
from amalgam.models.spec import DRAFT_LAYERS, ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

NORM_EPS, THETA = 1e-5, 500000.0
_SMALLEST_SUM = 1e-6  # what the class's least sum of the chosen probabilities may be and still change nothing


@dataclass(frozen=True)
class CorrectedSoftmaxRouter:
    """Softmax over all experts; a bias per expert takes part in the choice, but not in the weights, which sum to 1."""

    num_experts: int
    num_active_experts: int

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")
        yield Slot("router_correction", (1, self.num_experts), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        correction = weights["router_correction"].dequantize(torch.float32).flatten()
        return Route(x, weights["router"], layer_id, self.num_active_experts, correction=correction, normalises=True)


def _read_moe(config: ConfigReader) -> SparseMoe:
    config.expect("moe_gate", "topk")
    least = config.float("moe_norm_min", default=1e-12, low=0)
    if least > _SMALLEST_SUM:
        config.refuse("moe_norm_min", least, f"at most {_SMALLEST_SUM:g}")
    router = CorrectedSoftmaxRouter(
        *read_expert_counts(config, "moe_k", "moe_num_experts", default_experts=64, default_active=6)
    )
    size = config.int("moe_intermediate_size", default=1536)
    return SparseMoe(router, size, shared_size=size * config.int("moe_num_shared_experts", default=2, low=0))


def _read_spec(config: ConfigReader) -> ModelSpec:
    config.expect("use_bias", False)
    common = read_attention(config, default_theta=THETA, default_kv_heads=4, default_eps=NORM_EPS)
    attention = replace(common, is_interleaved=True)
    moe, dense = _read_moe(config), DenseMlp(config.int("intermediate_size"))
    num_layers = config.int("num_hidden_layers")
    first, end = (
        config.int("moe_layer_start_index", default=1, low=0),
        config.int("moe_layer_end_index", default=-1, low=-1),
    )
    end = num_layers - 1 if end == -1 else end
    interval = config.int("moe_layer_interval", default=1)
    layers = tuple(
        LayerSpec(attention, moe if (i + 1) % interval == 0 and first <= i <= end else dense) for i in range(num_layers)
    )
    return read_model(config, "ernie4_5_moe", layers, default_eps=NORM_EPS, default_tied=True)


_CORRECTION = "model.layers.{}.mlp.moe_statics.e_score_correction_bias"

FAMILY = Family(
    name="ernie4_5_moe",
    architectures=("Ernie4_5_MoeForCausalLM",),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        **MLP,
        **EXPERTS,
        **SHARED_EXPERTS,
        "layers.{}.mlp.router_correction": _CORRECTION,
    },
    fused=(  # the last one as transformers 5 has it
        *FUSED_EXPERTS,
        renamed_tensor("model.layers.{}.mlp.gate.moe_statics.e_score_correction_bias", _CORRECTION),
    ),
    left_out={r"model\.mtp_.*": DRAFT_LAYERS},
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "moe_num_experts": 8,
        "moe_k": 2,
    },
)
