"""Granite 3 MoE (`GraniteMoeForCausalLM`, `GraniteMoeSharedForCausalLM`): Granite's factors, softmax over the chosen
experts, perhaps beside a shared one. And Granite 4 (`GraniteMoeHybridForCausalLM`), whose layers may be Mamba-2's, and
which may have the shared expert alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from amalgam.formats.fused import FusedTensor
from amalgam.kernels.program import Route, Rows
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.blocks.state_space import StateSpace
from amalgam.models.naming import ATTENTION, DECODER, NUMBERED_EXPERTS, fused_experts, with_biases
from amalgam.models.reading.attention import NORM_EPS, read_attention
from amalgam.models.reading.layers import read_expert_counts, read_model, with_multipliers
from amalgam.models.spec import AttentionBlock, ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

_INFINITY = {"__float__": "Infinity"}  # as transformers 5 writes it
_PLAIN, _SHARED_ONE, _HYBRID = (f"GraniteMoe{kind}ForCausalLM" for kind in ("", "Shared", "Hybrid"))


@dataclass(frozen=True)
class ChosenRouter:
    """The k largest scores, and a softmax over those alone."""

    num_experts: int
    num_active_experts: int

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        return Route(x, weights["router"], layer_id, self.num_active_experts, scoring="chosen")


def _read_mlp(config: ConfigReader, architecture: str) -> SparseMoe | DenseMlp:
    if architecture == _HYBRID and config.int("num_local_experts", default=8, low=0) == 0:
        return DenseMlp(config.int("shared_intermediate_size", default=1024))
    router = ChosenRouter(*read_expert_counts(config, default_experts=8, default_active=2))
    default_shared = {_SHARED_ONE: 0, _HYBRID: 1024}.get(architecture)
    shared = 0 if default_shared is None else config.int("shared_intermediate_size", default=default_shared, low=0)
    return SparseMoe(router, config.int("intermediate_size"), shared_size=shared)


def _read_step_limits(config: ConfigReader) -> tuple[float, float]:
    """The least and the largest step of a state space; null is the class's default."""
    found = config.get("time_step_limit", default=[0.0, math.inf])
    limits = [math.inf if limit == _INFINITY else limit for limit in found] if isinstance(found, list) else []
    is_number = [isinstance(limit, int | float) and not isinstance(limit, bool) for limit in limits]
    if len(limits) != 2 or not all(is_number) or not 0 <= limits[0] <= min(limits[1], sys.float_info.max):
        limits = []
    if not limits or sys.float_info.max < limits[1] != math.inf:
        config.refuse("time_step_limit", found, "two numbers of at least 0, the first no larger than the second")
    return float(limits[0]), float(limits[1])


def _read_state_space(config: ConfigReader) -> StateSpace:
    width = config.int("mamba_expand", default=2) * config.int("hidden_size")
    heads, groups = config.int("mamba_n_heads", default=128), config.int("mamba_n_groups", default=1)
    is_derived = config.get("mamba_d_head", default="auto") == "auto"
    head_dim = max(1, width // heads) if is_derived else config.int("mamba_d_head")
    if heads * head_dim != width:
        config.refuse("mamba_d_head", head_dim, f"{width} (mamba_expand × hidden_size) / mamba_n_heads {heads}")
    if heads % groups:
        config.refuse("mamba_n_groups", groups, f"a divisor of mamba_n_heads {heads}")
    return StateSpace(
        num_heads=heads,
        head_dim=head_dim,
        state_dim=config.int("mamba_d_state", default=256),
        num_groups=groups,
        kernel_size=config.int("mamba_d_conv", default=4, low=2, high=64),
        norm_eps=config.float("rms_norm_eps", default=NORM_EPS, low=0),
        has_bias=config.bool("mamba_proj_bias", default=False),
        has_convolution_bias=config.bool("mamba_conv_bias", default=True),
        limits=_read_step_limits(config),
    )


def _read_hybrid(config: ConfigReader, attention: AttentionBlock, num_layers: int) -> list[AttentionBlock]:
    """Attention or state space of each layer, under the names of today and of older files."""
    types = config.get("layers_block_type", "layer_types", default=["linear_attention"] * num_layers)
    full, linear = ("full_attention", "attention"), ("linear_attention", "mamba")
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in full + linear for kind in types):
        config.refuse("layer_types", types, f"{num_layers} of {', '.join(full + linear)}")
    if not any(kind in full for kind in types):
        config.refuse("layer_types", types, "at least one full_attention")
    space = _read_state_space(config) if any(kind in linear for kind in types) else None
    return [attention if space is None or kind in full else space for kind in types]


def _read_spec(config: ConfigReader) -> ModelSpec:
    architecture, num_layers = config.get("architectures")[0], config.int("num_hidden_layers")
    attention = replace(
        read_attention(config, has_bias=config.bool("attention_bias", default=False)),
        scale=config.float("attention_multiplier", default=1.0),
    )
    attentions: list[AttentionBlock] = [attention] * num_layers
    if architecture == _HYBRID:
        if config.get("position_embedding_type") != "rope":
            config.expect("position_embedding_type", None, "nope")
            attention = replace(attention, rope=None)
        attentions = _read_hybrid(config, attention, num_layers)
    mlp = _read_mlp(config, architecture)
    layers = tuple(LayerSpec(block, mlp) for block in attentions)
    return with_multipliers(config, read_model(config, "granitemoe", layers))


_LAYER = "model.layers.{}"
_EXPERTS, _SHARED, _MAMBA = f"{_LAYER}.block_sparse_moe", f"{_LAYER}.shared_mlp", f"{_LAYER}.mamba"

FAMILY = Family(
    name="granitemoe",
    architectures=(_PLAIN, _SHARED_ONE, _HYBRID),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        **with_biases(
            {
                "layers.{}.attention.in": f"{_MAMBA}.in_proj.weight",
                "layers.{}.attention.convolution": f"{_MAMBA}.conv1d.weight",
                "layers.{}.attention.out": f"{_MAMBA}.out_proj.weight",
            }
        ),
        "layers.{}.attention.log_rate": f"{_MAMBA}.A_log",
        "layers.{}.attention.step_bias": f"{_MAMBA}.dt_bias",
        "layers.{}.attention.skip": f"{_MAMBA}.D",
        "layers.{}.attention.norm": f"{_MAMBA}.norm.weight",
        **NUMBERED_EXPERTS,
        "layers.{}.mlp.router": f"{_EXPERTS}.router.layer.weight",
        **{f"layers.{{}}.mlp.shared.{part}": f"{_SHARED}.{part}_proj.weight" for part in ("gate", "up", "down")},
        **{f"layers.{{}}.mlp.{part}": f"{_SHARED}.{part}_proj.weight" for part in ("gate", "up", "down")},
    },
    fused=(
        FusedTensor(f"{_EXPERTS}.input_linear", (f"{_EXPERTS}.experts.{{}}.w1", f"{_EXPERTS}.experts.{{}}.w3")),
        FusedTensor(f"{_EXPERTS}.output_linear", (f"{_EXPERTS}.experts.{{}}.w2",)),
        FusedTensor(f"{_SHARED}.input_linear", (f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj"), is_stacked=False),
        FusedTensor(f"{_SHARED}.output_linear", (f"{_SHARED}.down_proj",), is_stacked=False),
        # As transformers 5 has them.
        *fused_experts(f"{_EXPERTS}.experts.{{}}", ("w1", "w3", "w2"), stored=f"{_EXPERTS}.experts"),
        FusedTensor(f"{_EXPERTS}.router", (f"{_EXPERTS}.router.layer",), is_stacked=False),
    ),
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
)
