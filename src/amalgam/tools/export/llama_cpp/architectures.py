"""Which models llama.cpp has, by what name, and what it wants to be told of each beside what all share.

In: a family's name and its model. Out: the architecture's name and keys. Must never know: weights, files.

An architecture is a function of the model and a line in `ARCHITECTURES`; `amalgam.formats.gguf.config` reads what is
written here, and an export compares what it reads with the model (`checking`), so that nothing is said by half.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from amalgam.errors import UnsupportedError
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.delta_net import DeltaNet, KimiDeltaNet
from amalgam.models.blocks.latent_attention import LatentAttention
from amalgam.models.blocks.mixture import SparseMoe
from amalgam.models.blocks.short_convolution import ShortConvolution
from amalgam.models.blocks.state_space import StateSpace
from amalgam.tools.export.llama_cpp.metadata import SIGMOID, SOFTMAX, Described, Extra, Model, described, yarn_factor


def architecture_of(family: str, model: Model) -> str:
    """llama.cpp's name of an architecture.

    Raises:
        UnsupportedError: it has none for the family.
    """
    if family == "granitemoe":
        is_hybrid = any(model.blocks(StateSpace)) or model.moe is None
        return "granitehybrid" if is_hybrid else "granitemoe"
    name = _NAMES.get(family)
    if name is None or (family == "xverse" and model.moe is not None):
        raise UnsupportedError(
            f"llama.cpp has no architecture for models of family {family!r}.",
            remedy=f"It has one for {', '.join(sorted({*_NAMES, 'granitemoe'}))}. Export to another target: `--to hf`.",
        )
    return name


def describe_model(family: str, model: Model) -> tuple[str, Described]:
    """The architecture and what a file says of the model; keys with the architecture's prefix."""
    architecture = architecture_of(family, model)
    common = described(model)
    keys = {**common.keys, **_EXTRAS.get(architecture, _none)(model)}
    keys = {key: value for key, value in keys.items() if value is not None}
    return architecture, Described({f"{architecture}.{key}": value for key, value in keys.items()}, common.tables)


def sizes_of(model: Model) -> dict[str, Any]:
    """What the order of rows depends on, by config.json's names (`amalgam.formats.gguf.placing`)."""
    attention = model.attention
    sizes: dict[str, Any] = {"num_attention_heads": attention.num_heads, "num_experts": model.spec.num_experts}
    if isinstance(attention, LatentAttention):
        sizes["qk_nope_head_dim"] = attention.nope_dim
    else:
        sizes["num_key_value_heads"] = attention.num_kv_heads
    if (net := next(model.blocks(DeltaNet), None)) is not None:
        sizes |= {
            "linear_num_key_heads": net.num_key_heads,
            "linear_num_value_heads": net.num_value_heads,
            "linear_key_head_dim": net.key_dim,
            "linear_value_head_dim": net.value_dim,
            "is_tiled": net.is_tiled,
        }
    if (space := next(model.blocks(StateSpace), None)) is not None:
        sizes["state_groups"] = space.num_groups
    return sizes


def _none(model: Model) -> Mapping[str, Any]:
    return {}


def _moe(model: Model) -> SparseMoe:
    assert model.moe is not None
    return model.moe


def _window(model: Model) -> Mapping[str, Any]:
    return {"attention.sliding_window": model.window}


def _pattern(model: Model) -> list[bool]:
    """Which layers have a window."""
    return [getattr(layer.attention, "window", None) is not None for layer in model.spec.layers]


def _expert_size(model: Model) -> Mapping[str, Any]:
    return {"expert_feed_forward_length": _moe(model).intermediate_size}


def _normalising(model: Model) -> Mapping[str, Any]:
    return {"expert_weights_norm": bool(getattr(_moe(model).router, "normalises", False))}


def _shared_size(model: Model) -> Mapping[str, Any]:
    return {"expert_shared_feed_forward_length": _moe(model).shared_size or None}


def _grouped(model: Model) -> Mapping[str, Any]:
    """DeepSeek's experts: shared ones, dense layers first, groups, a factor."""
    moe = _moe(model)
    router: Any = moe.router
    is_sigmoid = hasattr(router, "has_correction")
    groups = getattr(router, "groups", None)
    return {
        **_expert_size(model),
        "leading_dense_block_count": model.num_dense,
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_weights_scale": float(router.scaling),
        "expert_weights_norm": bool(getattr(router, "normalises", False)),
        "expert_gating_func": SIGMOID if is_sigmoid else SOFTMAX,
        "expert_group_count": 1 if groups is None else groups.num_groups,
        "expert_group_used_count": 1 if groups is None else groups.num_kept,
    }


def _latent(model: Model) -> Mapping[str, Any]:
    """As attention runs on the latent vector: one KV head, keys and values of its size."""
    attention = model.attention
    assert isinstance(attention, LatentAttention)
    keys: dict[str, Any] = {
        **_grouped(model),
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": attention.query_rank,
        "attention.kv_lora_rank": attention.latent_rank,
        "attention.key_length": attention.latent_rank + attention.rope_dim,
        "attention.value_length": attention.latent_rank,
        "attention.key_length_mla": attention.nope_dim + attention.rope_dim,
        "attention.value_length_mla": attention.value_dim,
        "rope.dimension_count": attention.rope_dim,
    }
    plain = (attention.nope_dim + attention.rope_dim) ** -0.5
    factor = getattr(getattr(attention.rope, "scaling", None), "factor", 1.0)
    if attention.scale != plain and factor > 1:
        # Scores are scaled by the square of YaRN's own factor, 0.1 mscale ln(factor) + 1; the key is 0.1 mscale.
        keys["rope.scaling.yarn_log_multiplier"] = ((attention.scale / plain) ** 0.5 - 1) / math.log(factor)
    return keys


def _indexed(model: Model) -> Mapping[str, Any]:
    attentions = (layer.attention for layer in model.spec.layers)
    indexer: Any = next(found for one in attentions if (found := getattr(one, "indexer", None)) is not None)
    return {
        **_latent(model),
        "attention.indexer.head_count": indexer.num_heads,
        "attention.indexer.key_length": indexer.head_dim,
        "attention.indexer.top_k": indexer.num_chosen,
    }


def _glm_dsa(model: Model) -> Mapping[str, Any]:
    have_one = [getattr(layer.attention, "indexer", None) is not None for layer in model.spec.layers]
    return {**_indexed(model), "attention.indexer.types": have_one}


def _mistral4(model: Model) -> Mapping[str, Any]:
    attention: Any = model.attention
    return {
        **_latent(model),
        "attention.temperature_scale": float(attention.sharpening[0]),
        "attention.temperature_length": int(attention.sharpening[1]),
    }


def _bailing3(model: Model) -> Mapping[str, Any]:
    net = next(model.blocks(KimiDeltaNet), None)
    if net is None or net.bound is None:
        raise UnsupportedError(
            "llama.cpp's architecture 'bailingmoe3' has delta nets whose rates are bounded (kda_safe_gate).",
            remedy="Export to another target: `--to hf`.",
        )
    mlps = [layer.mlp for layer in model.spec.layers]
    limits = {
        key: [float(getattr(getattr(mlp, name, None), "limit", None) or 0) for mlp in mlps]
        for key, name in (("swiglu_clamp_exp", "activation"), ("swiglu_clamp_shexp", "shared_activation"))
    }
    return {
        **_latent(model),
        **_shared_size(model),
        **{key: values for key, values in limits.items() if any(values)},
        "attention.head_count_kv": [int(isinstance(one.attention, LatentAttention)) for one in model.spec.layers],
        "kda.head_dim": net.head_dim,
        "kda.safe_gate": True,
        "kda.gate_lower_bound": float(net.bound),
        "ssm.conv_kernel": net.kernel_size,
    }


def _gemma(model: Model) -> Mapping[str, Any]:
    attention: Any = model.attention
    return {
        **_window(model),
        "attn_logit_softcapping": attention.softcap,
        "final_logit_softcapping": model.spec.logits_softcap,
    }


def _gemma3(model: Model) -> Mapping[str, Any]:
    local = next((one for one in model.blocks(Attention) if one.window is not None), None)
    base = None if local is None or local.rope is None else float(local.rope.theta)
    return {**_gemma(model), "rope.freq_base_swa": base}


def _gemma4(model: Model) -> Mapping[str, Any]:
    attentions: list[Any] = [layer.attention for layer in model.spec.layers]
    local = next((one for one in attentions if one.window is not None), None)
    full = next(one for one in attentions if one.window is None)
    near = full if local is None else local
    mlps: list[Any] = [layer.mlp for layer in model.spec.layers]
    experts = next((mlp for mlp in mlps if mlp.num_experts), None)
    inputs: Any = model.spec.layer_inputs
    keys = {
        **_window(model),
        "attention.sliding_window_pattern": _pattern(model),
        "attention.shared_kv_layers": sum(one.source is not None for one in attentions),
        "attention.head_count_kv": [one.num_kv_heads for one in attentions],
        "attention.key_length": full.head_dim,
        "attention.value_length": full.head_dim,
        "attention.key_length_swa": near.head_dim,
        "attention.value_length_swa": near.head_dim,
        "rope.dimension_count": full.head_dim,
        "rope.dimension_count_swa": near.head_dim,
        "rope.freq_base": float(full.rope.theta),
        "rope.freq_base_swa": float(near.rope.theta),
        "embedding_length_per_layer_input": 0 if inputs is None else inputs.size,
        "feed_forward_length": [getattr(mlp, "dense_size", mlp.intermediate_size) for mlp in mlps],
        "final_logit_softcapping": model.spec.logits_softcap,
    }
    if experts is not None:
        keys |= {
            "expert_count": experts.num_experts,
            "expert_used_count": experts.num_active_experts,
            "expert_feed_forward_length": experts.intermediate_size,
        }
    return keys


def _phi3(model: Model) -> Mapping[str, Any]:
    trained = model.config.get("original_max_position_embeddings") or model.spec.max_positions
    return {**_window(model), "rope.scaling.original_context_length": trained}


def _olmo2(model: Model) -> Mapping[str, Any]:
    if model.window is None:
        return {}
    return {
        **_window(model),
        "attention.sliding_window_pattern": _pattern(model),
        "rope.scaling.yarn_attn_factor": yarn_factor(model.rope),
    }


def _mistral3(model: Model) -> Mapping[str, Any]:
    attention: Any = model.attention
    if attention.sharpening is None:
        return _window(model)
    settings = model.config.get("rope_parameters") or model.config.get("rope_scaling") or {}
    return {
        **_window(model),
        "attention.temperature_scale": float(attention.sharpening[0]),
        "attention.temperature_length": int(attention.sharpening[1]),
        "rope.scaling.yarn_log_multiplier": float(settings.get("mscale_all_dim") or 1.0),
    }


def _granite(model: Model) -> Mapping[str, Any]:
    attention: Any = model.attention
    spec = model.spec
    return {
        "attention.scale": float(attention.scale),
        "embedding_scale": float(spec.embedding_scale),
        "residual_scale": float(spec.residual_scale),
        "logit_scale": 1.0 / spec.logits_scale,
    }


def _granite_moe(model: Model) -> Mapping[str, Any]:
    return {**_granite(model), **_shared_size(model), "feed_forward_length": _moe(model).intermediate_size}


def _kv_heads(model: Model) -> list[int]:
    """Of each layer; 0 where it has a state."""
    return [getattr(layer.attention, "num_kv_heads", 0) for layer in model.spec.layers]


def _granite_hybrid(model: Model) -> Mapping[str, Any]:
    space = next(model.blocks(StateSpace), None)
    keys: dict[str, Any] = {**_granite(model), "attention.head_count_kv": _kv_heads(model)}
    if model.moe is not None:
        keys |= {**_shared_size(model), "feed_forward_length": model.moe.intermediate_size}
    if model.rope is None:
        keys |= {"rope.scaling.finetuned": False, "rope.dimension_count": getattr(model.attention, "head_dim", None)}
    if space is not None:
        keys |= {
            "ssm.conv_kernel": space.kernel_size,
            "ssm.state_size": space.state_dim,
            "ssm.group_count": space.num_groups,
            "ssm.inner_size": space.num_heads * space.head_dim,
            "ssm.time_step_rank": space.num_heads,
        }
    return keys


def _lfm2(model: Model) -> Mapping[str, Any]:
    kernel = next((block.kernel_size for block in model.blocks(ShortConvolution)), 3)
    return {"attention.head_count_kv": _kv_heads(model), "shortconv.l_cache": kernel}


def _lfm2_moe(model: Model) -> Mapping[str, Any]:
    router: Any = _moe(model).router
    return {
        **_lfm2(model),
        **_expert_size(model),
        **_normalising(model),
        "leading_dense_block_count": model.num_dense,
        "expert_gating_func": SIGMOID,
        "expert_weights_scale": float(router.scaling),
    }


def _delta_net(model: Model) -> Mapping[str, Any]:
    net = next(model.blocks(DeltaNet), None)
    full = next(i for i, layer in enumerate(model.spec.layers) if isinstance(layer.attention, Attention))
    keys: dict[str, Any] = {"full_attention_interval": full + 1}
    if net is not None:
        keys |= {
            "ssm.conv_kernel": net.kernel_size,
            "ssm.state_size": net.key_dim,
            "ssm.group_count": net.num_key_heads,
            "ssm.time_step_rank": net.num_value_heads,
            "ssm.inner_size": net.value_dim * net.num_value_heads,
        }
    return keys


def _delta_net_experts(model: Model) -> Mapping[str, Any]:
    return {**_delta_net(model), **_expert_size(model), **_shared_size(model), **_normalising(model)}


def _qwen35(model: Model) -> Mapping[str, Any]:
    # Axes of images, which share the frequencies; a text's tokens are at the same position on each.
    settings = model.config.get("rope_parameters") or model.config.get("rope_scaling") or {}
    sections = list(settings.get("mrope_section") or [11, 11, 10])
    return {"rope.dimension_sections": [*sections, 0][:4]}


def _corrected(model: Model) -> Mapping[str, Any]:
    moe = _moe(model)
    router: Any = moe.router
    return {
        **_expert_size(model),
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_weights_scale": float(router.scaling),
        "expert_weights_norm": bool(router.normalises),
        "expert_gating_func": SIGMOID,
        "leading_dense_block_count": model.num_dense,
    }


def _exaone_moe(model: Model) -> Mapping[str, Any]:
    return {
        **_corrected(model),
        **_shared_size(model),
        "attention.sliding_window": model.window or int(model.config.get("sliding_window") or 0) or None,
        "attention.sliding_window_pattern": _pattern(model),
    }


def _ernie_moe(model: Model) -> Mapping[str, Any]:
    moe = _moe(model)
    sparse = model.spec.moe_layer_ids
    return {
        **_expert_size(model),
        "interleave_moe_layer_step": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
        "leading_dense_block_count": int(model.config.get("moe_layer_start_index", 1)),
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_shared_feed_forward_length": moe.shared_size or None,
    }


def _hunyuan(model: Model) -> Mapping[str, Any]:
    size = _moe(model).intermediate_size
    return {
        **_expert_size(model),
        "expert_shared_feed_forward_length": size,
        "expert_shared_count": 1,
        "feed_forward_length": size,
    }


def _olmoe(model: Model) -> Mapping[str, Any]:
    clip = getattr(model.attention, "clip", None)
    return {**_normalising(model), "attention.clamp_kqv": None if clip is None else float(clip)}


def _gpt2(model: Model) -> Mapping[str, Any]:
    return {"attention.head_count_kv": None}  # as many as heads, which the architecture has no key for


def _minimax(model: Model) -> Mapping[str, Any]:
    return {**_expert_size(model), "expert_gating_func": SIGMOID}


def _llama4(model: Model) -> Mapping[str, Any]:
    sparse = model.spec.moe_layer_ids
    step = sparse[0] + 1 if sparse else 1
    return {**_expert_size(model), "interleave_moe_layer_step": step, "expert_gating_func": SIGMOID}


def _gpt_oss(model: Model) -> Mapping[str, Any]:
    return {**_expert_size(model), **_window(model), "feed_forward_length": _moe(model).intermediate_size}


def _both(*extras: Extra) -> Extra:
    return lambda model: {key: value for extra in extras for key, value in extra(model).items()}


# Family → architecture; Granite's with experts has two.
_NAMES: Mapping[str, str] = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "olmoe", "gemma2", "gemma3", "gemma4", "phi3", "olmo2")},
    **{name: name for name in ("smollm3", "seed_oss", "ernie4_5", "granite", "starcoder2", "lfm2", "dots1")},
    **{name: name for name in ("llama4", "gpt2", "xverse", "mistral4")},
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "olmo3": "olmo2",
    "ministral3": "mistral3",
    "lfm2_moe": "lfm2moe",
    "minimax_m2": "minimax-m2",
    "exaone_moe": "exaone-moe",
    "ernie4_5_moe": "ernie4_5-moe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "glm4_moe_lite": "deepseek2",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe": "glm4moe",
    "deepseek_v32": "deepseek32",
    "glm_moe_dsa": "glm-dsa",
    "bailing_hybrid": "bailingmoe3",
    "gpt_oss": "gpt-oss",
}
_EXTRAS: Mapping[str, Extra] = {
    "llama": _window,
    "qwen2": _window,
    "gemma2": _gemma,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "mistral3": _mistral3,
    "granite": _granite,
    "starcoder2": _window,
    "granitemoe": _granite_moe,
    "granitehybrid": _granite_hybrid,
    "lfm2": _lfm2,
    "lfm2moe": _lfm2_moe,
    "qwen2moe": _both(_expert_size, _shared_size, _normalising),
    "qwen3moe": _both(_expert_size, _normalising),
    "qwen3next": _delta_net_experts,
    "qwen35": _both(_delta_net, _qwen35),
    "qwen35moe": _both(_delta_net_experts, _qwen35),
    "olmoe": _olmoe,
    "gpt2": _gpt2,
    "minimax-m2": _minimax,
    "dots1": _corrected,
    "exaone-moe": _exaone_moe,
    "ernie4_5-moe": _ernie_moe,
    "hunyuan-moe": _hunyuan,
    "llama4": _llama4,
    "glm4moe": _grouped,
    "deepseek2": _latent,
    "mistral4": _mistral4,
    "deepseek32": _indexed,
    "glm-dsa": _glm_dsa,
    "bailingmoe3": _bailing3,
    "gpt-oss": _gpt_oss,
}
