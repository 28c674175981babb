"""Hunyuan A13B (`HunYuanMoEV1ForCausalLM`): heads are normed behind the rotation; experts beside a shared one."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.mixture import SoftmaxRouter, SparseMoe
from amalgam.models.naming import ATTENTION, DECODER, EXPERTS, FUSED_EXPERTS
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_model
from amalgam.models.reading.rope import RopeSettings
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-5
# Beside `alpha`, which alone counts then.
_NTK_SETTINGS = frozenset({"alpha", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"})
_LAYER = "model.layers.{}"


def _read_attention(config: ConfigReader) -> Attention:
    config.expect("use_qk_norm", True)
    config.expect("use_cla", False)
    settings = RopeSettings(config)
    alpha = settings.optional("alpha") if settings.kind == "dynamic" else None
    attention = read_attention(
        config,
        default_eps=NORM_EPS,
        has_bias=config.bool("attention_bias", default=False),
        rope_settings=frozenset() if alpha is None else _NTK_SETTINGS,
    )
    rope, dim = attention.rope, attention.head_dim
    if alpha is not None and rope is not None:  # a base that is stretched once and for all
        rope = replace(rope, theta=rope.theta * alpha ** (dim / (dim - 2)))
    return replace(attention, rope=rope, has_head_norm=True, norms_last=True)


def _shared_by_layers(config: ConfigReader, *keys: str, default: int) -> int:
    """A number, or a list of the same number for each layer."""
    value = config.get(*keys, default=default)
    numbers = value if isinstance(value, list) else [value]
    if not numbers or len(set(numbers)) != 1 or type(numbers[0]) is not int or numbers[0] < 1:
        config.refuse(config.present(*keys), value, "one number from 1 on for all layers")
    return int(numbers[0])


def _read_spec(config: ConfigReader) -> ModelSpec:
    size = config.int("intermediate_size")
    config.expect("moe_layer_num_skipped", 0)
    for key, expected in (("num_shared_expert", 1), ("moe_intermediate_size", size)):
        found = _shared_by_layers(config, key, default=expected)
        if found != expected:
            config.refuse(key, found, str(expected))
    num_experts = _shared_by_layers(config, "num_experts", "num_local_experts", default=1)
    num_active = _shared_by_layers(config, "moe_topk", "num_experts_per_tok", default=1)
    if num_active > num_experts:
        config.refuse("moe_topk", num_active, f"at most the {num_experts} experts of a layer")
    moe = SparseMoe(SoftmaxRouter(num_experts, num_active, normalises=True), size, shared_size=size)
    layer = LayerSpec(_read_attention(config), moe)
    return read_model(config, "hunyuan_v1_moe", (layer,) * config.int("num_hidden_layers"), default_eps=NORM_EPS)


FAMILY = Family(
    name="hunyuan_v1_moe",
    architectures=("HunYuanMoEV1ForCausalLM",),
    read_spec=_read_spec,
    names={
        **DECODER,
        **ATTENTION,
        **EXPERTS,
        "layers.{}.attention.q_norm": f"{_LAYER}.self_attn.query_layernorm.weight",
        "layers.{}.attention.k_norm": f"{_LAYER}.self_attn.key_layernorm.weight",
        "layers.{}.mlp.router": f"{_LAYER}.mlp.gate.wg.weight",
        **{
            f"layers.{{}}.mlp.shared.{part}": f"{_LAYER}.mlp.shared_mlp.{part}_proj.weight"
            for part in ("gate", "up", "down")
        },
    },
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 32,
        "num_experts": 8,
        "moe_topk": 2,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 1000.0},
    },
)
