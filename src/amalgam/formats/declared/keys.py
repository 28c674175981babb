"""Keys of declarations that say nothing about what the weights mean, and those that say too much.

In: nothing; these are constants, collected from what published checkpoints and the tools that write them contain. Out:
sets of keys by reason. A key that decides how bits are read does not belong here: a method reads it, or the checkpoint
is refused. Must never know: files, tensors.
"""

from __future__ import annotations

# Who made the checkpoint, of what, and how small it became.
_ORIGIN = {
    "meta",
    "provider",
    "producer",
    "autoround_version",
    "model_name_or_path",
    "model_file_base_name",
    "global_compression_ratio",
    "quantization_status",
}
# How codes and scales were found. They are stored; what found them is of no importance.
_CALIBRATION = {
    *("dataset", "tokenizer", "batch_size", "nsamples", "seqlen", "model_seqlen", "pad_token_id", "seed"),
    *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "act_group_aware", "hyb_act"),
    *("observer", "observer_kwargs", "iters", "lr", "minmax_lr", "momentum", "lr_scheduler", "nblocks", "sampler"),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "enable_alg_ext", "enable_adam"),
    *("gradient_accumulate_steps", "low_gpu_mem_usage", "low_cpu_mem_usage", "amp", "not_use_best_mse"),
    *(
        "train_bs",
        "use_quant_input",
        "n_samples",
        "n_blocks",
        "dynamic_max_gap",
        "disable_opt_rtn",
        "model_free",
        "scale_dtype",
        "zp_dtype",
        "optimize",
        "round_zero",
    ),
}
# Which modules a tool looked at. What came of it, tensors tell by their names.
_SCOPE = {
    *("modules_in_block_to_quantize", "block_name_to_quantize", "module_name_preceding_first_block"),
    *("to_quant_block_names", "quant_block_list", "quant_nontext_module", "inside_layer_modules", "supported_types"),
}
# How inputs, and keys and values of attention, are rounded by other engines. Ours stay wide.
_ACTIVATIONS = {
    *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym"),
    *("activation_scheme", "activation_scale_ub", "attention_input_activations"),
    *("kv_cache_scheme", "kv_cache_quant_algo", "static_kv_dtype", "static_kv_granularity"),
    *("static_attention_dtype", "static_attention_granularity"),
}
# How other engines compute.
_RUNTIME = {
    *("backend", "use_exllama", "disable_exllama", "exllama_config", "use_cuda_fp16", "max_input_length"),
    *("cache_block_outputs", "fuse_max_seq_len", "do_fuse", "modules_to_fuse", "parallel_packing", "device"),
    *("run_compressed", "dequantize", "use_optimized_inference", "offload_meta"),
}

HARMLESS = frozenset(_ORIGIN | _CALIBRATION | _SCOPE | _ACTIVATIONS | _RUNTIME)
"""Harmless wherever they stand, for every method."""

# Compute types, thresholds for outliers, and nesting of scales, which each weight's own tensors tell.
BITSANDBYTES = frozenset(
    {
        *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_use_double_quant", "bnb_4bit_quant_type"),
        *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_threshold"),
        *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
    }
)
# Each weight has tensors `group_size`, `axis`, `view_as_float` of its own.
HQQ_WEIGHTS = frozenset({"group_size", "axis", "channel_wise", "view_as_float"})
# GPTQModel writes them for every method; these have a meaning for words of 32 bits only.
WORDS = frozenset({"pack_dtype", "desc_act", "sym", "group_size"})

TRANSFORMS = frozenset(
    {
        *("rotation", "rotations", "rotation_config", "rotation_configs", "hadamard", "hadamard_config", "rotate"),
        *("transform_config", "transforms_config", "spinquant_config", "quarot_config", "flatquant_config"),
        *("ostquant_config", "online_rotation", "online_hadamard", "had_k", "krot"),
    }
)
"""Keys of tools that multiply weights by a matrix which the inputs need too."""

TRANSFORMS_OF_A_MODEL = frozenset(key for key in TRANSFORMS if key.endswith("_config"))
"""Those that stand beside the declaration, in config.json itself, where a tool found no declaration to add to."""
