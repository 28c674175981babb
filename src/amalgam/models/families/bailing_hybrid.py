"""Ling 3 (`BailingMoeV3ForCausalLM`, in transformers `BailingHybridForCausalLM`): several layers of Kimi Delta
Attention to one of latent attention with a gate per head, experts in groups.

The layer for multi-token prediction is not loaded. Ling 2.5 and Ring 2.5, whose `model_type` is the same, have another
linear attention and another architecture.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from amalgam.formats.fused import FusedTensor
from amalgam.kernels.weights import SWIGLU, GatedActivation
from amalgam.models.blocks.delta_net import KimiDeltaNet
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.naming import CORRECTED_EXPERTS, FUSED_EXPERTS, MLP, renamed_tensor
from amalgam.models.reading.attention import NORM_EPS, read_latent_attention
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers
from amalgam.models.spec import AttentionBlock, ConfigReader, Family, LayerSpec, ModelSpec

_THETA, _SHARE = 6e6, "partial_rotary_factor"
# What transformers calls keys in its own files, and what the published ones do.
_SYNONYMS = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_local_experts": "num_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "n_shared_experts": "num_shared_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}


def _with_published_keys(config: ConfigReader) -> ConfigReader:
    found = {name: config.get(name, synonym) for synonym, name in _SYNONYMS.items()}
    return config.completed({name: value for name, value in found.items() if value is not None})


def _read_delta_net(config: ConfigReader) -> KimiDeltaNet:
    config.expect("no_kda_lora", True)
    is_bounded = config.bool("kda_safe_gate", default=True)
    bound = config.float("kda_lower_bound", default=-5.0)
    if bound >= 0:
        config.refuse("kda_lower_bound", bound, "a number below 0")
    kernel_size = config.int("short_conv_kernel_size", default=4, low=2, high=64)
    # transformers writes sizes of its own beside the published keys, and heeds those.
    return KimiDeltaNet(
        num_heads=config.int("linear_num_heads", default=config.int("num_attention_heads")),
        head_dim=config.int("linear_head_dim", default=config.int("head_dim", default=128)),
        kernel_size=config.int("linear_conv_kernel_dim", default=kernel_size, low=2, high=64),
        norm_eps=config.float("rms_norm_eps", default=NORM_EPS, low=0),
        bound=bound if is_bounded else None,
    )


def _without_share(config: ConfigReader) -> ConfigReader:
    """Without the share of a head that turns, which published files write beside `qk_rope_head_dim`: it is of the delta
    nets' heads, and no class reads it."""
    rope_dim, values = config.int("qk_rope_head_dim", default=64), dict(config.values)
    head_dim = config.int("linear_head_dim", default=config.int("head_dim", default=128))
    parts = {key: config.object(key, default=None) for key in ("rope_parameters", "rope_scaling")}
    for fields in (config, *parts.values()):
        share = 1.0 if fields is None else fields.float(_SHARE, default=1.0)
        if fields is not None and share not in (1.0, rope_dim / head_dim):
            fields.refuse(_SHARE, share, f"{rope_dim / head_dim:g}, which makes qk_rope_head_dim {rope_dim}")
    for key, part in parts.items():
        if part is not None:
            values[key] = {name: value for name, value in part.values.items() if name != _SHARE}
    values.pop(_SHARE, None)
    return ConfigReader(values, config.where, config.path)


def _read_attentions(config: ConfigReader) -> tuple[AttentionBlock, ...]:
    config.expect("rope_interleave", True)
    config.expect("gated_attention_proj_granularity_type", "head_wise")
    with_rank = _without_share(config).completed({"q_lora_rank": None, "rope_theta": _THETA})
    latent = read_latent_attention(with_rank, is_interleaved=True)
    num_layers, size = config.int("num_hidden_layers"), config.int("layer_group_size", default=6)
    default_types = [f"{'linear' if i % size else 'full'}_attention" for i in range(1, num_layers + 1)]
    types = config.get("layer_types", default=default_types)
    known: dict[str, AttentionBlock] = {
        "full_attention": replace(latent, has_head_gate=True),
        "linear_attention": _read_delta_net(config),
    }
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in tuple(known) for kind in types):
        config.refuse("layer_types", types, f"{num_layers} of {', '.join(known)}")
    if "full_attention" not in types:
        config.refuse("layer_types", types, "at least one full_attention")
    return tuple(known[kind] for kind in types)


def _with_limits(config: ConfigReader, layers: tuple[LayerSpec, ...]) -> tuple[LayerSpec, ...]:
    """Experts whose factors are limited, as the published model was trained. The class passes the limits over."""
    routed, shared = (
        _read_limits(config, key, len(layers)) for key in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")
    )
    return tuple(
        replace(layer, mlp=replace(layer.mlp, activation=routed[index], shared_activation=shared[index]))
        if isinstance(layer.mlp, SparseMoe)
        else layer
        for index, layer in enumerate(layers)
    )


def _read_limits(config: ConfigReader, key: str, num_layers: int) -> list[GatedActivation]:
    """Of each layer; 0 and null: there is none."""
    limits = config.get(key, default=[None] * num_layers)
    if not isinstance(limits, list) or len(limits) != num_layers or not all(map(_is_limit, limits)):
        config.refuse(key, limits, f"{num_layers} numbers of at least 0, one for each layer")
    return [GatedActivation(limit=float(limit), limits_last=True) if limit else SWIGLU for limit in limits]


def _is_limit(limit: object) -> bool:
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    return limit is None or (is_number and 0 <= limit <= sys.float_info.max)  # type: ignore[operator]


def _read_spec(config: ConfigReader) -> ModelSpec:
    config = _with_published_keys(config)
    for key in ("use_bias", "use_qkv_bias", "tie_word_embeddings"):
        config.expect(key, False)
    config.expect("moe_router_enable_expert_bias", True)
    config.expect("moe_shared_expert_intermediate_size", config.int("moe_intermediate_size"))
    config.expect("score_function", "sigmoid")
    router = read_corrected_router(config, default_groups=8, default_kept=4, default_scaling=2.5)
    layers = read_moe_layers(
        config, _read_attentions(config), router, default_dense=2, default_shared=1, shared_key="num_shared_experts"
    )
    layers = _with_limits(config, layers)
    num_drafts = config.int("num_nextn_predict_layers", default=1, low=0)
    return replace(read_model(config, "bailing_hybrid", layers), num_draft_layers=num_drafts)


_LAYER = "model.layers.{}"
_ATTENTION, _IN_MEMORY = f"{_LAYER}.attention", f"{_LAYER}.self_attn"
_CORRECTION = f"{_LAYER}.mlp.gate.expert_bias"
_MODULES = (
    *(f"{part}_proj" for part in ("q", "k", "v", "g", "b", "o", "q_a", "q_b", "kv_b")),
    *("kv_a_proj_with_mqa", "q_a_layernorm", "kv_a_layernorm", "o_norm"),
)


def _renamed(stored: str, *logical: str) -> FusedTensor:
    return FusedTensor(stored, logical, is_stacked=False)


_RENAMED = (
    # Published so for latent attention; transformers publishes all of them so.
    _renamed(f"{_ATTENTION}.dense", f"{_ATTENTION}.o_proj"),
    # As transformers has them in memory.
    _renamed("model.embed_tokens", "model.word_embeddings"),
    *(_renamed(f"{_IN_MEMORY}.{module}", f"{_ATTENTION}.{module}") for module in _MODULES),
    _renamed(f"{_IN_MEMORY}.forget_gate.f_proj", f"{_ATTENTION}.f_proj"),
    _renamed(f"{_IN_MEMORY}.conv1d", *(f"{_ATTENTION}.{part}_conv1d" for part in "qkv")),
    *(renamed_tensor(f"{_IN_MEMORY}.forget_gate.{name}", f"{_ATTENTION}.{name}") for name in ("A_log", "dt_bias")),
    renamed_tensor(f"{_LAYER}.mlp.gate.e_score_correction_bias", _CORRECTION),
)

FAMILY = Family(
    name="bailing_hybrid",
    architectures=("BailingHybridForCausalLM", "BailingMoeV3ForCausalLM"),
    read_spec=_read_spec,
    names={
        "embedding": "model.word_embeddings.weight",
        "norm": "model.norm.weight",
        "head": "lm_head.weight",
        "layers.{}.attention_norm": f"{_LAYER}.input_layernorm.weight",
        "layers.{}.mlp_norm": f"{_LAYER}.post_attention_layernorm.weight",
        **{
            f"layers.{{}}.attention.{part}": f"{_ATTENTION}.{part}_proj.weight"
            for part in ("q", "k", "v", "f", "g", "b", "q_a", "q_b", "kv_b")
        },
        **{f"layers.{{}}.attention.{part}_convolution": f"{_ATTENTION}.{part}_conv1d.weight" for part in "qkv"},
        **{f"layers.{{}}.attention.{part}_norm": f"{_ATTENTION}.{part}_layernorm.weight" for part in ("q_a", "kv_a")},
        "layers.{}.attention.log_rate": f"{_ATTENTION}.A_log",
        "layers.{}.attention.decay_bias": f"{_ATTENTION}.dt_bias",
        "layers.{}.attention.norm": f"{_ATTENTION}.o_norm.weight",
        "layers.{}.attention.out": f"{_ATTENTION}.o_proj.weight",
        "layers.{}.attention.kv_a": f"{_ATTENTION}.kv_a_proj_with_mqa.weight",
        "layers.{}.attention.kv_a_bias": f"{_ATTENTION}.kv_a_proj_with_mqa.bias",
        "layers.{}.attention.o": f"{_ATTENTION}.o_proj.weight",
        "layers.{}.attention.o_bias": f"{_ATTENTION}.o_proj.bias",
        **MLP,
        **CORRECTED_EXPERTS,
        "layers.{}.mlp.router_correction": _CORRECTION,
    },
    fused=(*FUSED_EXPERTS, *_RENAMED),
    tiny_config={
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_key_value_heads": 4,
        "head_dim": 8,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_local_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "num_mtp_layers": 0,
    },
)
