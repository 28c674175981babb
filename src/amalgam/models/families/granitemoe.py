"""Granite 3 MoE (`GraniteMoeForCausalLM`, `GraniteMoeSharedForCausalLM`): Granite's factors, softmax over the chosen
experts, perhaps beside a shared one. And Granite 4 (`GraniteMoeHybridForCausalLM`) where no layer is Mamba's, which may
have the shared expert alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from amalgam.formats.fused import FusedTensor
from amalgam.kernels.program import Route, Rows
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, NUMBERED_EXPERTS, fused_experts
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_expert_counts, read_model, with_multipliers
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights

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


def _read_spec(config: ConfigReader) -> ModelSpec:
    architecture, num_layers = config.get("architectures")[0], config.int("num_hidden_layers")
    attention = replace(
        read_attention(config, has_bias=config.bool("attention_bias", default=False)),
        scale=config.float("attention_multiplier", default=1.0),
    )
    if architecture == _HYBRID:
        types = config.get("layers_block_type", "layer_types", default=["linear_attention"] * num_layers)
        if types not in (["attention"] * num_layers, ["full_attention"] * num_layers):
            config.refuse("layer_types", types, "attention in every layer")
        if config.get("position_embedding_type") != "rope":
            config.expect("position_embedding_type", None, "nope")
            attention = replace(attention, rope=None)
    layer = LayerSpec(attention, _read_mlp(config, architecture))
    return with_multipliers(config, read_model(config, "granitemoe", (layer,) * num_layers))


_LAYER = "model.layers.{}"
_EXPERTS, _SHARED = f"{_LAYER}.block_sparse_moe", f"{_LAYER}.shared_mlp"

FAMILY = Family(
    name="granitemoe",
    architectures=(_PLAIN, _SHARED_ONE, _HYBRID),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
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
