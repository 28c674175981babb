"""A published checkpoint → a GGUF file, by the rules of llama.cpp's converter, with the `gguf` package's writer.

Names come from that package's own table (`gguf.get_tensor_name_map`), so that ours is tested against it.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen3NextForCausalLM": "qwen3next",
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3_5MoeForCausalLM": "qwen35moe",
    "OlmoeForCausalLM": "olmoe",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma4ForCausalLM": "gemma4",
    "Phi3ForCausalLM": "phi3",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "SmolLM3ForCausalLM": "smollm3",
    "SeedOssForCausalLM": "seed_oss",
    "Ministral3ForCausalLM": "mistral3",
    "Ernie4_5ForCausalLM": "ernie4_5",
    "GraniteForCausalLM": "granite",
    "Starcoder2ForCausalLM": "starcoder2",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeSharedForCausalLM": "granitemoe",
    "GraniteMoeHybridForCausalLM": "granitehybrid",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2moe",
    "MiniMaxM2ForCausalLM": "minimax-m2",
    "Dots1ForCausalLM": "dots1",
    "ExaoneMoeForCausalLM": "exaone-moe",
    "Ernie4_5_MoeForCausalLM": "ernie4_5-moe",
    "HunYuanMoEV1ForCausalLM": "hunyuan-moe",
    "Llama4ForCausalLM": "llama4",
    "Glm4MoeLiteForCausalLM": "deepseek2",
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
    "Glm4MoeForCausalLM": "glm4moe",
    "GlmMoeDsaForCausalLM": "glm-dsa",
    "DeepseekV32ForCausalLM": "deepseek32",
    "Mistral4ForCausalLM": "mistral4",
    "BailingHybridForCausalLM": "bailingmoe3",
    "GptOssForCausalLM": "gpt-oss",
    "GPT2LMHeadModel": "gpt2",
    "XverseForCausalLM": "xverse",
}
HAVE_WINDOWS = ("llama", "gpt-oss", "gemma2", "gemma3", "phi3", "olmo2", "starcoder2")
HAVE_PAIRS = ("llama", "xverse", "smollm3", "mistral3", "granite", "granitemoe", "granitehybrid")
HAVE_MOE_SIZES = (
    *("qwen2moe", "qwen3moe", "deepseek2", "glm-dsa", "glm4moe", "dots1", "exaone-moe", "ernie4_5-moe", "lfm2moe"),
    *("deepseek32", "mistral4", "bailingmoe3"),
)
HAVE_LATENTS = ("deepseek2", "deepseek32", "glm-dsa", "mistral4", "bailingmoe3")
SPLIT = ("deepseek32", "mistral4", "bailingmoe3")  # no file of these has keys and values in one piece
# Not in the package, and whose tensors have the same names.
ALIKE = {"deepseek32": "glm-dsa", "bailingmoe3": "kimi-linear"}
KIND = gguf.GGMLQuantizationType
# What transformers calls keys of Ling 3.
BAILING_KEYS = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}
HYBRID = ("qwen3next", "qwen35", "qwen35moe")
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe|feed_forward)\.experts\.(\d+)\.(\w+)\.(weight|bias)"
)
_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def write_gguf(
    folder: Path,
    file: Path,
    kind: gguf.GGMLQuantizationType = KIND.F32,
    *,
    fuses_gate_up: bool = False,
    stacks_experts: bool = True,
    splits_latent: bool = False,
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
    **options: Any,
) -> Path:
    """Write the checkpoint in `folder` as `file`; matrices in `kind`, vectors and routers in float32."""
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["architectures"][0]]
    if architecture == "bailingmoe3":
        config = {BAILING_KEYS.get(key, key): value for key, value in config.items()}
    splits_latent = splits_latent or architecture in SPLIT
    writer = gguf.GGUFWriter(file, architecture, **options)
    write_metadata(writer, config, architecture, splits_latent)
    if edit is not None:
        edit(writer)
    tensors = {name: tensor.float().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    converted = _converted(tensors, config, architecture, fuses_gate_up, stacks_experts)
    if splits_latent:
        converted = _split_latent(converted, config)
    for name, array in converted.items():
        is_wide = (
            array.ndim == 1
            or name.endswith((".bias", "ffn_gate_inp.weight", "ssm_a", "ssm_d"))
            or any(part in name for part in ("norm", "conv1d", "shortconv.conv"))
        )
        if is_wide or kind == KIND.F32:
            writer.add_tensor(name, np.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _converted(
    tensors: Mapping[str, np.ndarray], config: dict[str, Any], architecture: str, fuses: bool, stacks: bool
) -> dict[str, np.ndarray]:
    known = ALIKE.get(architecture, architecture)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == known)
    layers = config.get("num_hidden_layers", config.get("n_layer"))
    table = gguf.get_tensor_name_map(arch, layers)
    result: dict[str, np.ndarray] = {}
    experts: defaultdict[tuple[str, str, str], dict[int, np.ndarray]] = defaultdict(dict)
    for name, array in tensors.items():
        if match := _EXPERT.fullmatch(name):
            experts[match[1], _PARTS[match[3]], match[4]][int(match[2])] = array
            continue
        if architecture == "gpt-oss" and ".experts." in name:
            result |= _gpt_oss_experts(name, array)
            continue
        if architecture == "gemma4":
            name, special = _gemma4(name)
            if special is not None:
                result[special] = array
                continue
        if (architecture == "llama4" and ".experts." in name) or "_linear" in name:
            parts = _joined_parts(name, array, architecture)
            has_experts = bool(config.get("num_local_experts", True))
            result |= parts if has_experts else {key.replace("_shexp", ""): part for key, part in parts.items()}
            continue
        if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = array.T
        if architecture in ("gemma2", "gemma3") and name.endswith("norm.weight"):
            array = array + 1
        if architecture in HAVE_PAIRS and (part := re.search(r"\.([qk])_proj\.", name)):
            heads = config["num_attention_heads"]
            array = _permute(array, heads if part[1] == "q" else config.get("num_key_value_heads", heads))
        if architecture in HYBRID:
            found = _hybrid(name, array, config, architecture)
            if len(found) > 1:
                result |= found
                continue
            ((name, array),) = found.items()
        if architecture in ("granitehybrid", "lfm2", "lfm2moe"):
            name, array = _with_states(name, array, config)
        if architecture == "mistral4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            name += ".weight"
        if architecture == "bailingmoe3":
            name, array = _bailing3(name, array, config)
        if name.endswith("e_score_correction_bias"):
            array = array.squeeze()
            name = name.replace("e_score_correction_bias", "e_score_correction.bias")
        if name.endswith("sinks"):
            name += ".weight"
        found = name if name.startswith("blk.") else table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        result[found] = array
    for (layer, part, suffix), by_expert in experts.items():
        prefix = f"blk.{layer}.ffn_{part}"
        if stacks:
            result[f"{prefix}_exps.{suffix}"] = np.stack([by_expert[i] for i in range(len(by_expert))])
        else:
            result |= {f"{prefix}.{i}.{suffix}": array for i, array in by_expert.items()}
    if fuses:
        for layer in {layer for layer, *_ in experts}:
            parts = [result.pop(f"blk.{layer}.ffn_{part}_exps.weight") for part in ("gate", "up")]
            result[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
    scaling = config.get("rope_parameters") or {}
    if scaling.get("rope_type") == "longrope":
        for length in ("short", "long"):
            result[f"rope_factors_{length}.weight"] = np.array(scaling[f"{length}_factor"], np.float32)
    if (full := scaling.get("full_attention", {})).get("rope_type") == "proportional":
        half = _full_layer(config)["head_dim"] // 2
        turning = int(half * full["partial_rotary_factor"])
        result["rope_freqs.weight"] = np.array([1.0] * turning + [1e30] * (half - turning), np.float32)
    if scaling.get("rope_type") == "llama3":
        result["rope_freqs.weight"] = _llama3_divisors(config, scaling)
    return result


def _hybrid(name: str, array: np.ndarray, config: dict[str, Any], architecture: str) -> dict[str, np.ndarray]:
    """`Qwen3NextModel` and `_LinearAttentionVReorderBase` of the converter."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key_dim, value_dim = config["linear_key_head_dim"], config["linear_value_head_dim"]

    def tiled(heads: np.ndarray, dim: int) -> np.ndarray:
        return heads.reshape(keys, values // keys, dim, *heads.shape[1:]).swapaxes(0, 1).reshape(heads.shape)

    leaf = name.split("linear_attn.")[-1]
    if architecture != "qwen3next" and leaf != name:
        if leaf in ("in_proj_qkv.weight", "conv1d.weight"):
            head = 2 * keys * key_dim
            array = np.concatenate((array[:head], tiled(array[head:], value_dim)))
        elif leaf == "in_proj_z.weight":
            array = tiled(array, value_dim)
        elif leaf in ("in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
            array = tiled(array, 1)
        elif leaf == "out_proj.weight":
            array = np.ascontiguousarray(tiled(array.T, value_dim).T)
    if leaf == "in_proj_qkvz.weight":
        groups = array.reshape(keys, -1, array.shape[1])
        shared = values // keys * value_dim
        parts = np.split(groups, [key_dim, 2 * key_dim, 2 * key_dim + shared], axis=1)
        query, key, value, gate = (part.reshape(-1, array.shape[1]) for part in parts)
        layer = name.split(".")[2]
        return {
            f"blk.{layer}.attn_qkv.weight": np.concatenate((query, key, value)),
            f"blk.{layer}.attn_gate.weight": gate,
        }
    if leaf == "A_log":
        array = -np.exp(array)
    elif leaf == "dt_bias":
        name = name.replace("dt_bias", "dt_proj.bias")
    elif leaf == "conv1d.weight":
        array = array.squeeze(1)
    elif name.endswith("norm.weight") and leaf != "norm.weight":
        array = array + 1
    return {name: array}


def _gemma4(name: str) -> tuple[str, str | None]:
    """`Gemma4Model` of the converter: the name that the table knows, or the one in the file."""
    layer = name.split(".")[2] if name.startswith("model.layers.") else ""
    for published, written in (
        ("router.scale", "ffn_gate_inp.scale"),
        ("router.per_expert_scale", "ffn_down_exps.scale"),
    ):
        if name.endswith(published):
            return name, f"blk.{layer}.{written}"
    return f"{name}.weight" if name.endswith(
        ("layer_scalar", "experts.gate_up_proj", "experts.down_proj")
    ) else name, None


def _full_layer(config: dict[str, Any]) -> dict[str, int]:
    """Sizes of Gemma 4's full layers."""
    full = next(i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention")
    found: dict[str, int] = config["per_layer_config"][str(full)]
    return found


def _with_states(name: str, array: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    """`Mamba2Model`, and `LFM2MoeModel` of the converter."""
    if name.endswith((".conv1d.weight", ".conv.conv.weight")):
        array = array.squeeze(1)
    elif name.endswith((".A_log", ".D")):
        array = (-np.exp(array) if name.endswith("A_log") else array)[:, None]
    elif name.endswith("mamba.norm.weight"):
        array = array.reshape(config["mamba_n_groups"], -1)
    return name.replace(".dt_bias", ".dt_proj.bias").replace(".expert_bias", ".expert_bias.bias"), array


def _bailing3(name: str, array: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    """`BailingMoeV3Model` of the converter: names that Kimi Linear's table knows, or the one in the file."""
    name = name.replace("word_embeddings", "embed_tokens").replace("attention.dense", "attention.o_proj")
    name = name.replace(".attention.", ".self_attn.").replace("gate.expert_bias", "gate.e_score_correction_bias")
    if name.endswith("conv1d.weight"):
        array = array[None]
    elif name.endswith("A_log"):
        array = np.exp(array)[:, None]
    elif name.endswith("dt_bias"):
        name = name.replace("dt_bias", "dt_proj.bias")
    elif match := re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([fg])_proj\.weight", name):
        is_full = config["layer_types"][int(match[1])] == "full_attention"
        name = f"blk.{match[1]}.{'attn_gate' if is_full else f'ssm_{match[2]}_a'}.weight"
    return name, array


def _gpt_oss_experts(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    layer = re.search(r"\.(\d+)\.", name)
    assert layer is not None
    prefix = f"blk.{layer[1]}.ffn_"
    is_bias = name.endswith("_bias")
    suffix = "bias" if is_bias else "weight"
    rows = array if is_bias else array.transpose(0, 2, 1)
    if "down_proj" in name:
        return {f"{prefix}down_exps.{suffix}": rows}
    return {f"{prefix}gate_exps.{suffix}": rows[:, ::2], f"{prefix}up_exps.{suffix}": rows[:, 1::2]}


def _joined_parts(name: str, array: np.ndarray, architecture: str) -> dict[str, np.ndarray]:
    """Gate and up in one tensor, of all experts or of the shared one; down."""
    layer = re.search(r"\.(\d+)\.", name)
    assert layer is not None
    kind = "shexp" if "shared" in name else "exps"
    rows = array.swapaxes(-1, -2) if architecture == "llama4" else array
    if "down_proj" in name or "output_linear" in name:
        return {f"blk.{layer[1]}.ffn_down_{kind}.weight": rows}
    gate, up = np.split(rows, 2, axis=-2)
    return {f"blk.{layer[1]}.ffn_gate_{kind}.weight": gate, f"blk.{layer[1]}.ffn_up_{kind}.weight": up}


def _split_latent(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    result = {}
    for name, array in tensors.items():
        if not name.endswith("attn_kv_b.weight"):
            result[name] = array
            continue
        heads = array.reshape(config["num_attention_heads"], -1, array.shape[1])
        key, value = np.split(heads, [config["qk_nope_head_dim"]], axis=1)
        prefix = name.removesuffix("kv_b.weight")
        result |= {f"{prefix}k_b.weight": key.transpose(0, 2, 1), f"{prefix}v_b.weight": value}
    return result


def _permute(array: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of the converter."""
    split = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return split.swapaxes(1, 2).reshape(array.shape)


def _llama3_divisors(config: dict[str, Any], scaling: dict[str, Any]) -> np.ndarray:
    dim = config["head_dim"]
    frequencies = 1.0 / (scaling["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    low, high, original = (
        scaling[key] for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    divisors = []
    for frequency in frequencies:
        wavelength = 2 * np.pi / float(frequency)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(scaling["factor"])
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, np.float32)


def write_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str, splits_latent: bool) -> None:
    def number(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    heads = number("num_attention_heads", "n_head")
    writer.add_block_count(number("num_hidden_layers", "n_layer"))
    writer.add_context_length(number("max_position_embeddings", "n_positions"))
    writer.add_embedding_length(number("hidden_size", "n_embd"))
    writer.add_feed_forward_length(
        number("intermediate_size_mlp", "intermediate_size", "n_inner") or 4 * number("hidden_size", "n_embd")
    )
    writer.add_head_count(heads)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    kv_heads = number("num_key_value_heads", "num_attention_heads")
    if architecture in ("granitehybrid", "lfm2", "lfm2moe"):
        kv_heads = [kv_heads if kind == "full_attention" else 0 for kind in config["layer_types"]]
    elif architecture == "bailingmoe3":
        kv_heads = [int(kind == "full_attention") for kind in config["layer_types"]]
    elif splits_latent:
        kv_heads = 1
    writer.add_head_count_kv(kv_heads)
    if architecture == "starcoder2":
        writer.add_layer_norm_eps(config["norm_epsilon"])
    else:
        writer.add_layer_norm_rms_eps(number("rms_norm_eps", "norm_eps"))
    rope = config.get("rope_parameters") or {"rope_type": "default", "rope_theta": config["rope_theta"]}
    rope = rope.get("full_attention", rope)
    dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_rope_freq_base(rope["rope_theta"] * rope.get("alpha", 1.0) ** (dim / (dim - 2)))
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if architecture == "mistral3":
                writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
                writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
            elif rope.get("mscale_all_dim"):
                writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if architecture in HAVE_LATENTS:
        _write_latent_attention(writer, config, splits_latent)
    else:
        head_dim = number("head_dim") or config["hidden_size"] // heads
        share = config["rotary_dim"] / head_dim if config.get("rotary_dim") else rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(head_dim * share))
        writer.add_vocab_size(config["vocab_size"])
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if config.get("clip_qkv"):
        writer.add_clamp_kqv(config["clip_qkv"])
    if config.get("sliding_window") and architecture in HAVE_WINDOWS:
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "olmo2" and config.get("sliding_window"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if architecture == "phi3":
        original = config["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] == "longrope":
            scale = config["max_position_embeddings"] / original
            writer.add_rope_scaling_attn_factors(np.sqrt(1 + np.log(scale) / np.log(original)) if scale > 1 else 1.0)
    if architecture in ("granite", "granitemoe", "granitehybrid"):
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    experts = number("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(number("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"))
    _write_newer_experts(writer, config, architecture)
    if architecture == "gemma4":
        _write_gemma4(writer, config)
    if architecture in HAVE_MOE_SIZES:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if architecture == "gpt-oss":
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if architecture in HYBRID:
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        writer.add_full_attention_interval(2)
        if experts:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
            writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if architecture in ("lfm2", "lfm2moe"):
        writer.add_shortconv_l_cache(config["conv_L_cache"])
    if architecture == "granitehybrid":
        writer.add_ssm_conv_kernel(config["mamba_d_conv"])
        writer.add_ssm_state_size(config["mamba_d_state"])
        writer.add_ssm_group_count(config["mamba_n_groups"])
        writer.add_ssm_inner_size(config["mamba_expand"] * config["hidden_size"])
        writer.add_ssm_time_step_rank(config["mamba_n_heads"])
        if config.get("position_embedding_type") != "rope":
            writer.add_rope_scaling_finetuned(False)
    if architecture in ("qwen35", "qwen35moe"):
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    if architecture == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if architecture in ("glm-dsa", "deepseek32"):
        writer.add_indexer_head_count(config["index_n_heads"])
        writer.add_indexer_key_length(config["index_head_dim"])
        writer.add_indexer_top_k(config["index_topk"])
    if architecture == "glm-dsa":
        writer.add_array("glm-dsa.attention.indexer.types", [kind == "full" for kind in config["indexer_types"]])
    if architecture == "bailingmoe3":
        del writer.kv_data[0]["bailingmoe3.attention.value_length"]
        writer.add_value_length(config["linear_head_dim"])
        writer.add_ssm_conv_kernel(config["short_conv_kernel_size"])
        writer.add_uint32("bailingmoe3.kda.head_dim", config["linear_head_dim"])
        writer.add_bool("bailingmoe3.kda.safe_gate", config["kda_safe_gate"])
        writer.add_float32("bailingmoe3.kda.gate_lower_bound", config["kda_lower_bound"])
        writer.add_expert_shared_feed_forward_length(config["moe_intermediate_size"])
    if architecture in (*HAVE_LATENTS, "glm4moe"):
        writer.add_leading_dense_block_count(config.get("first_k_dense_replace", 1))
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        is_sigmoid = config["architectures"][0] not in ("DeepseekV2ForCausalLM", "Mistral4ForCausalLM")
        writer.add_expert_gating_func(
            gguf.ExpertGatingFuncType.SIGMOID if is_sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
        )
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])


def _write_gemma4(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """`Gemma4Model.set_gguf_parameters` of the converter, in place of what `write_metadata` has written."""
    rope, full = config["rope_parameters"], _full_layer(config)
    sliding = [kind == "sliding_attention" for kind in config["layer_types"]]
    shared, num_layers = config["num_kv_shared_layers"], config["num_hidden_layers"]
    for key in ("key_length", "value_length", "head_count_kv"):
        del writer.kv_data[0][f"gemma4.attention.{key}"]
    for key in ("rope.dimension_count", "feed_forward_length"):
        del writer.kv_data[0][f"gemma4.{key}"]
    writer.add_rope_freq_base_swa(rope["sliding_attention"]["rope_theta"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_shared_kv_layers(shared)
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"] or 0)
    writer.add_key_length(full["head_dim"])
    writer.add_value_length(full["head_dim"])
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count(full["head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    kv_heads = config["num_key_value_heads"]
    writer.add_head_count_kv([kv_heads if local else full.get("num_key_value_heads", kv_heads) for local in sliding])
    size, wide = config["intermediate_size"], 2 if config["use_double_wide_mlp"] else 1
    first = num_layers - shared
    writer.add_feed_forward_length([size * (wide if layer >= first else 1) for layer in range(num_layers)])
    if config["enable_moe_block"]:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _write_newer_experts(writer: gguf.GGUFWriter, config: dict[str, Any], architecture: str) -> None:
    """What the converters of 2025 and later write."""
    if architecture in ("dots1", "exaone-moe"):
        writer.add_expert_shared_count(config.get("n_shared_experts") or config["num_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if architecture in ("minimax-m2", "dots1", "exaone-moe"):
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    match architecture:
        case "minimax-m2":
            writer.add_expert_feed_forward_length(config["intermediate_size"])
        case "exaone-moe":
            size = config["moe_intermediate_size"] * config["num_shared_experts"]
            writer.add_expert_shared_feed_forward_length(size)
            writer.add_sliding_window(config["sliding_window"])
            writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
            writer.add_nextn_predict_layers(0)
            writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        case "ernie4_5-moe":
            writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
            writer.add_leading_dense_block_count(config["moe_layer_start_index"])
            writer.add_expert_shared_count(config["moe_num_shared_experts"])
            writer.add_expert_shared_feed_forward_length(config["intermediate_size"] // config["num_key_value_heads"])
        case "hunyuan-moe":
            writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
            writer.add_expert_feed_forward_length(config["intermediate_size"])
            writer.add_expert_shared_count(1)
            writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
            writer.add_rope_scaling_factor(1)
            writer.add_rope_scaling_orig_ctx_len(256 * 1024)
        case "granitemoe" | "granitehybrid" if config.get("shared_intermediate_size"):
            writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
        case "lfm2moe":
            writer.add_leading_dense_block_count(config["num_dense_layers"])
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        case "llama4":
            writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
            writer.add_expert_feed_forward_length(config["intermediate_size"])


def _write_latent_attention(writer: gguf.GGUFWriter, config: dict[str, Any], splits: bool) -> None:
    """Until 2025 with `attn_kv_b` in one piece; then split, and described as it runs on the latent vector."""
    if config.get("q_lora_rank") is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    key_dim, rope_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["qk_rope_head_dim"]
    if splits:
        writer.add_key_length(config["kv_lora_rank"] + rope_dim)
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(key_dim)
        writer.add_value_length_mla(config["v_head_dim"])
    else:
        writer.add_key_length(key_dim)
        writer.add_value_length(config["v_head_dim"])
    writer.add_rope_dimension_count(rope_dim)
