"""Gemma 4, text and the text part (`Gemma4ForCausalLM`, `Gemma4ForConditionalGeneration`, and the same of the model
without encoders, `Gemma4Unified…`): layers with a window and full ones, whose heads differ in size and number; keys
that serve as values; experts beside a dense MLP; keys and values that the last layers share; an embedding for each
layer. What sees and hears is left out.

Google DeepMind 2026, "Gemma 4".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from amalgam.kernels.program import Add, Emitter, Mix, Normalize, Route, Rows
from amalgam.kernels.weights import GEGLU
from amalgam.models.blocks.attention import Attention, ones_beside
from amalgam.models.blocks.layer_inputs import EmbeddedInputs
from amalgam.models.blocks.mlp import DenseMlp, emit_gated, gated_slots
from amalgam.models.blocks.norms import RmsNorm
from amalgam.models.naming import (
    ATTENTION,
    HEAD_NORMS,
    MLP,
    SANDWICH_DECODER,
    fused_experts,
    fused_in_language_model,
    in_language_model,
)
from amalgam.models.reading.attention import NORM_EPS, by_layer_type, every_nth_full, read_attention, read_window
from amalgam.models.reading.gemma import read_softcap
from amalgam.models.reading.hybrid import text_config
from amalgam.models.reading.layers import GELU, read_expert_counts, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, MlpBlock, ModelSpec, Norms, Slot
from amalgam.models.weights import BlockWeights

_UNIFIED = ("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration")
_FULL, _SLIDING = "full_attention", "sliding_attention"
# What configurations leave to the class.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "hidden_size_per_layer_input": 256,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 512,
}
_UNIFIED_DEFAULTS = {"hidden_size_per_layer_input": 0, "max_position_embeddings": 262144, "sliding_window": 1024}
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}


@dataclass(frozen=True)
class Gemma4Attention(Attention):
    """Queries and keys are normed with weights and values without; scores are not scaled.

    Attributes:
        has_values: False: the keys, before their norm, are the values.
        is_source: later layers attend to this one's keys and values, which stay where they are until then.
    """

    has_values: bool = True
    is_source: bool = False

    @property
    def shared_buffers(self) -> tuple[str, ...]:
        """Where the keys and values are that it has from another layer."""
        return () if self.source is None else tuple(f"{name}_of_{self.source}" for name in ("key", "value"))

    @property
    def _is_sharing(self) -> bool:
        return self.is_source or self.source is not None

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        lacking = {"k", "v", "k_norm"} if self.source is not None else set() if self.has_values else {"v"}
        for slot in super().slots(hidden_size):
            if slot.name.removesuffix("_bias") not in lacking:
                yield slot

    def head_norms(self, weights: BlockWeights) -> list[Tensor]:
        """None where `project` has done it: a layer that shares keys has no norm for them."""
        return [] if self._is_sharing else super().head_norms(weights)

    def project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows]:
        source = step.layer_id if self.source is None else self.source
        suffix = f"_of_{source}" if self._is_sharing else ""
        width = self.num_kv_heads * self.head_dim
        query = step.rows("query", self.num_heads * self.head_dim)
        key, value = step.rows(f"key{suffix}", width), step.rows(f"value{suffix}", width)
        places = {"q": query, "k": key, "v": value}
        parts = [name for name in places if name in weights]
        step.project(x, *((weights[name], weights.vector(f"{name}_bias"), places[name].buffer) for name in parts))
        norms = [("q_norm", query)] if self._is_sharing else []
        if self.source is None:
            ones = ones_beside(weights["q"], self.head_dim)
            step.add(Normalize(value if self.has_values else key, ones, value, self.norm_eps, rounds_last=True))
            norms += [("k_norm", key)] if self._is_sharing else []
        for name, rows in norms:
            step.add(Normalize(rows, weights[name].dense, rows, self.norm_eps, rounds_last=True))
        return query, key, value


@dataclass(frozen=True)
class ExpertsBesideMlp:
    """A dense MLP and experts, both of the stream, each with norms of its own before and behind.

    The router sees the stream normed once more, by a scale of its own, and its weights are multiplied by a factor of
    each expert.
    """

    num_experts: int
    num_active_experts: int
    intermediate_size: int
    dense_size: int
    norm_eps: float

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")
        yield Slot("router_scale", (hidden_size,), "router")
        yield Slot("router_factors", (self.num_experts,), "router")
        for name in ("experts_norm", "experts_post_norm", "shared_post_norm"):
            yield Slot(name, (hidden_size,), "norm")
        for expert_id in range(self.num_experts):
            yield from gated_slots(f"experts.{expert_id}.", hidden_size, self.intermediate_size, "expert")
        yield from gated_slots("shared.", hidden_size, self.dense_size, "shared_expert")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        stream, delta = step.rows("x", x.width), step.rows("delta", x.width)
        scored, routed = step.rows("scored", x.width), step.rows("routed", x.width)
        scale = weights["router_scale"].dense.float() * x.width**-0.5

        def normalize(rows: Rows, weight: Tensor, out: Rows) -> Normalize:
            return Normalize(rows, weight, out, self.norm_eps, rounds_last=True)

        shared = emit_gated(step, x, weights, "shared.", "shared", GEGLU)
        step.add(
            normalize(shared, weights["shared_post_norm"].dense, shared),
            normalize(stream, scale, scored),
            Route(
                scored,
                weights["router"],
                step.layer_id,
                self.num_active_experts,
                normalises=True,
                factors=weights["router_factors"].dense,
            ),
            normalize(stream, weights["experts_norm"].dense, routed),
            Mix(routed, weights.experts, delta, GEGLU),
            normalize(delta, weights["experts_post_norm"].dense, delta),
            Add(delta, shared),
        )
        return delta


def _read_full_sizes(config: ConfigReader, types: Sequence[str]) -> dict[str, int]:
    """Size of a head and number of KV heads of full layers: `global_…` as published, or layer by layer as
    transformers 5.23 saves them."""
    sizes = {"head_dim": config.int("global_head_dim", default=512)}
    if config.bool("attention_k_eq_v", default=False) and config.get("num_global_key_value_heads") is not None:
        sizes["num_key_value_heads"] = config.int("num_global_key_value_heads")
    layers = config.objects("per_layer_config")
    if not layers:  # an empty one: all layers have the same
        return sizes if config.get("per_layer_config") is None else {}
    full = {str(index) for index, kind in enumerate(types) if kind == _FULL}
    found = [dict(layer.values) for layer in layers.values()]
    known = {"head_dim", "num_key_value_heads"}
    if layers.keys() != full or any(one != found[0] or not one.keys() <= known for one in found):
        config.refuse(
            "per_layer_config",
            config.get("per_layer_config"),
            "one head_dim and num_key_value_heads for all full layers",
        )
    first = next(iter(layers.values()))
    return {key: first.int(key) for key in first.values}


def _read_attentions(config: ConfigReader) -> tuple[Gemma4Attention, ...]:
    types = config.get("layer_types", default=every_nth_full(config, 6))
    has_keys_as_values = config.bool("attention_k_eq_v", default=False)

    def of_type(layer_type: str, sizes: Mapping[str, int]) -> Gemma4Attention:
        of_layer = ConfigReader({**config.values, **sizes}, config.where, config.path)
        common = read_attention(
            of_layer,
            default_head_dim=256,
            default_kv_heads=4,
            has_bias=config.bool("attention_bias", default=False),
            layer_type=layer_type,
        )
        values = {**vars(common), "scale": 1.0, "has_head_norm": True, "head_norm_rounds_last": True}
        return Gemma4Attention(**values, has_values=layer_type == _SLIDING or not has_keys_as_values)

    local, window, count = of_type(_SLIDING, {}), read_window(config), config.int("num_hidden_layers")
    if not isinstance(types, list) or len(types) != count or types[-1] != _FULL:
        config.refuse("layer_types", types, f"{count} of {_SLIDING} and {_FULL}, the last of them {_FULL}")
    settings = config.object("rope_parameters")
    for kind in (_SLIDING, _FULL):
        if kind in types and settings.get(kind) is None:
            config.refuse("rope_parameters", settings.values, f"settings of {kind}")
    full = of_type(_FULL, _read_full_sizes(config, types))
    attentions = by_layer_type(config, local, window, every_nth_full(config, 6), full)
    return _with_sources(config, attentions)


def _with_sources(config: ConfigReader, attentions: Sequence[Gemma4Attention]) -> tuple[Gemma4Attention, ...]:
    """The last `num_kv_shared_layers` attend to what the last layer of their type before them has."""
    count = config.int("num_kv_shared_layers", default=0, low=0)
    first = len(attentions) - count
    sources = {attention: index for index, attention in enumerate(attentions[: max(first, 0)])}
    if count and not set(attentions) <= sources.keys():
        config.refuse("num_kv_shared_layers", count, "fewer, so that layers of each type have keys of their own")
    return tuple(
        replace(attention, source=sources[attention])
        if index >= first
        else replace(attention, is_source=bool(count) and sources[attention] == index)
        for index, attention in enumerate(attentions)
    )


def _read_mlp(config: ConfigReader, attention: Gemma4Attention) -> MlpBlock:
    size = config.int("intermediate_size")
    if attention.source is not None and config.bool("use_double_wide_mlp", default=False):
        size *= 2
    if not config.bool("enable_moe_block", default=False):
        return DenseMlp(size, activation=GEGLU)
    num_experts, num_active = read_expert_counts(config, "top_k_experts")
    inner = config.int("moe_intermediate_size")
    return ExpertsBesideMlp(num_experts, num_active, inner, size, config.float("rms_norm_eps", default=NORM_EPS, low=0))


def _read_spec(config: ConfigReader) -> ModelSpec:
    is_unified = config.get("architectures")[0] in _UNIFIED
    text = text_config(config).completed({**_DEFAULTS, **(_UNIFIED_DEFAULTS if is_unified else {})})
    if text.get("rope_parameters") is None:
        text = ConfigReader({**text.values, "rope_parameters": _ROPES}, text.where, text.path)
    text.expect("use_bidirectional_attention", None, False, "vision")  # images' tokens, of which there are none
    attentions = _read_attentions(text)
    layers = tuple(LayerSpec(attention, _read_mlp(text, attention)) for attention in attentions)
    eps = text.float("rms_norm_eps", default=NORM_EPS, low=0)
    size = 0 if text.is_null(_INPUTS) else text.int(_INPUTS, low=0)
    inputs = EmbeddedInputs(len(layers), size, text.int("vocab_size_per_layer_input"), eps) if size else None
    if inputs is not None and inputs.vocab_size < text.int("vocab_size"):
        text.refuse("vocab_size_per_layer_input", inputs.vocab_size, f"at least vocab_size {text.int('vocab_size')}")
    sharing = "|".join(str(index) for index, attention in enumerate(attentions) if attention.source is not None)
    spec = read_model(text, "gemma4", layers, default_tied=True, activations=GELU, activation_key="hidden_activation")
    return replace(
        spec,
        has_tied_head=config.bool("tie_word_embeddings", default=spec.has_tied_head),
        norm=RmsNorm(eps, rounds_last=True),
        norms=Norms.AROUND,
        embedding_scale=spec.hidden_size**0.5,
        rounds_embedding_scale=True,
        logits_softcap=read_softcap(text, "final_logit_softcapping", None),
        layer_inputs=inputs,
        has_layer_scalars=True,
        unused=((rf".*\.layers\.({sharing})\.self_attn\.[kv]_(proj|norm)\..*", _UNUSED),) if sharing else (),
    )


_INPUTS = "hidden_size_per_layer_input"
_UNUSED = "keys and values in place of which other layers' are used"
_LAYER = "model.layers.{}"
_PARTS = ("gate_proj", "up_proj", "down_proj")

FAMILY = Family(
    name="gemma4",
    architectures=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", *_UNIFIED),
    read_spec=_read_spec,
    names=in_language_model(
        {
            **SANDWICH_DECODER,
            **ATTENTION,
            **HEAD_NORMS,
            **MLP,
            "layers.{}.scalar": f"{_LAYER}.layer_scalar",
            "layers.{}.mlp.router": f"{_LAYER}.router.proj.weight",
            "layers.{}.mlp.router_scale": f"{_LAYER}.router.scale",
            "layers.{}.mlp.router_factors": f"{_LAYER}.router.per_expert_scale",
            "layers.{}.mlp.experts_norm": f"{_LAYER}.pre_feedforward_layernorm_2.weight",
            "layers.{}.mlp.experts_post_norm": f"{_LAYER}.post_feedforward_layernorm_2.weight",
            "layers.{}.mlp.shared_post_norm": f"{_LAYER}.post_feedforward_layernorm_1.weight",
            **{
                f"layers.{{}}.mlp.experts.{{}}.{part.removesuffix('_proj')}": f"{_LAYER}.experts.{{}}.{part}.weight"
                for part in _PARTS
            },
            **{
                f"layers.{{}}.mlp.shared.{part.removesuffix('_proj')}": f"{_LAYER}.mlp.{part}.weight" for part in _PARTS
            },
            "inputs_embedding": "model.embed_tokens_per_layer.weight",
            "inputs_projection": "model.per_layer_model_projection.weight",
            "inputs_norm": "model.per_layer_projection_norm.weight",
            "layers.{}.inputs.gate": f"{_LAYER}.per_layer_input_gate.weight",
            "layers.{}.inputs.projection": f"{_LAYER}.per_layer_projection.weight",
            "layers.{}.inputs.post_norm": f"{_LAYER}.post_per_layer_input_norm.weight",
        }
    ),
    fused=fused_in_language_model(fused_experts(f"{_LAYER}.experts.{{}}", _PARTS, stored=f"{_LAYER}.experts")),
    left_out={
        r"(model\.)?(vision_tower|vision_embedder|embed_vision)\..*": "the vision encoder",
        r"(model\.)?(audio_tower|embed_audio)\..*": "the audio encoder",
    },
    short_prefixes={
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "model.": "model.language_model.",
    },
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 16,
        "global_head_dim": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 8,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 24,
        "vocab_size_per_layer_input": 256,
    },
    reads_own_layers=True,
)
