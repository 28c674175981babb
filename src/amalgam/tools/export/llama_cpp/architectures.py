"""Which models llama.cpp has, by what name, and what it wants to be told of each beside what all share.

In: a family's name and its model. Out: the architecture's name and keys. Must never know: weights, files.

An architecture is a function of the model and a line in `ARCHITECTURES`; `amalgam.formats.gguf.config` reads what is
written here, and an export compares what it reads with the model (`checking`), so that nothing is said by half.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amalgam.errors import UnsupportedError
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.delta_net import DeltaNet
from amalgam.models.blocks.latent_attention import LatentAttention
from amalgam.models.blocks.short_convolution import ShortConvolution
from amalgam.models.blocks.state_space import StateSpace
from amalgam.tools.export.llama_cpp.experts import corrected, expert_size, grouped, moe_of, normalising, shared_size
from amalgam.tools.export.llama_cpp.latent import bailing3, glm_dsa, indexed, latent, mistral4
from amalgam.tools.export.llama_cpp.metadata import SIGMOID, Described, Extra, Model, described, yarn_factor


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


def _window(model: Model) -> Mapping[str, Any]:
    return {"attention.sliding_window": model.window}


def _pattern(model: Model) -> list[bool]:
    """Which layers have a window."""
    return [getattr(layer.attention, "window", None) is not None for layer in model.spec.layers]


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
    return {**_granite(model), **shared_size(model), "feed_forward_length": moe_of(model).intermediate_size}


def _kv_heads(model: Model) -> list[int]:
    """Of each layer; 0 where it has a state."""
    return [getattr(layer.attention, "num_kv_heads", 0) for layer in model.spec.layers]


def _granite_hybrid(model: Model) -> Mapping[str, Any]:
    space = next(model.blocks(StateSpace), None)
    keys: dict[str, Any] = {**_granite(model), "attention.head_count_kv": _kv_heads(model)}
    if model.moe is not None:
        keys |= {**shared_size(model), "feed_forward_length": model.moe.intermediate_size}
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
    router: Any = moe_of(model).router
    return {
        **_lfm2(model),
        **expert_size(model),
        **normalising(model),
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
    return {**_delta_net(model), **expert_size(model), **shared_size(model), **normalising(model)}


def _qwen35(model: Model) -> Mapping[str, Any]:
    # Axes of images, which share the frequencies; a text's tokens are at the same position on each.
    settings = model.config.get("rope_parameters") or model.config.get("rope_scaling") or {}
    sections = list(settings.get("mrope_section") or [11, 11, 10])
    return {"rope.dimension_sections": [*sections, 0][:4]}


def _exaone_moe(model: Model) -> Mapping[str, Any]:
    return {
        **corrected(model),
        **shared_size(model),
        "attention.sliding_window": model.window or int(model.config.get("sliding_window") or 0) or None,
        "attention.sliding_window_pattern": _pattern(model),
    }


def _ernie_moe(model: Model) -> Mapping[str, Any]:
    moe = moe_of(model)
    sparse = model.spec.moe_layer_ids
    return {
        **expert_size(model),
        "interleave_moe_layer_step": sparse[1] - sparse[0] if len(sparse) > 1 else 1,
        "leading_dense_block_count": int(model.config.get("moe_layer_start_index", 1)),
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_shared_feed_forward_length": moe.shared_size or None,
    }


def _hunyuan(model: Model) -> Mapping[str, Any]:
    size = moe_of(model).intermediate_size
    return {
        **expert_size(model),
        "expert_shared_feed_forward_length": size,
        "expert_shared_count": 1,
        "feed_forward_length": size,
    }


def _olmoe(model: Model) -> Mapping[str, Any]:
    clip = getattr(model.attention, "clip", None)
    return {**normalising(model), "attention.clamp_kqv": None if clip is None else float(clip)}


def _gpt2(model: Model) -> Mapping[str, Any]:
    return {"attention.head_count_kv": None}  # as many as heads, which the architecture has no key for


def _minimax(model: Model) -> Mapping[str, Any]:
    return {**expert_size(model), "expert_gating_func": SIGMOID}


def _llama4(model: Model) -> Mapping[str, Any]:
    sparse = model.spec.moe_layer_ids
    step = sparse[0] + 1 if sparse else 1
    return {**expert_size(model), "interleave_moe_layer_step": step, "expert_gating_func": SIGMOID}


def _gpt_oss(model: Model) -> Mapping[str, Any]:
    return {**expert_size(model), **_window(model), "feed_forward_length": moe_of(model).intermediate_size}


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
    "qwen2moe": _both(expert_size, shared_size, normalising),
    "qwen3moe": _both(expert_size, normalising),
    "qwen3next": _delta_net_experts,
    "qwen35": _both(_delta_net, _qwen35),
    "qwen35moe": _both(_delta_net_experts, _qwen35),
    "olmoe": _olmoe,
    "gpt2": _gpt2,
    "minimax-m2": _minimax,
    "dots1": corrected,
    "exaone-moe": _exaone_moe,
    "ernie4_5-moe": _ernie_moe,
    "hunyuan-moe": _hunyuan,
    "llama4": _llama4,
    "glm4moe": grouped,
    "deepseek2": latent,
    "mistral4": mistral4,
    "deepseek32": indexed,
    "glm-dsa": glm_dsa,
    "bailingmoe3": bailing3,
    "gpt-oss": _gpt_oss,
}
