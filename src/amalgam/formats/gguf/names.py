"""How GGUF files call the tensors of each architecture, and what llama.cpp's converter does to some of them.

In: nothing. Out: `NAMINGS`, architecture → GGUF name → logical name of the published checkpoint. Must never know:
files, layers, families.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from amalgam.formats.gguf import undoing
from amalgam.formats.gguf.undoing import Arrange

_LAYER = "model.layers.{}"


@dataclass(frozen=True)
class Naming:
    """How the tensors of one architecture are called.

    Attributes:
        names: GGUF name → logical name, both without `.weight` or `.bias` unless the suffix changes; `{}` stands for
            a number. A logical name with one `{}` more is that of one expert in a stack; several share the rows.
        has_pairs: rows of query and key alternate between the halves of each head.
        has_transposed: the published checkpoint stores unquantized projections as `[in, out]`.
        has_raised_norms: norms hold 1 more than the published checkpoint's.
        values: GGUF name without its layer → what makes the published values of a float32 tensor's.
    """

    names: Mapping[str, str | tuple[str, ...]]
    has_pairs: bool = False
    has_transposed: bool = False
    has_raised_norms: bool = False
    values: Mapping[str, Arrange] = field(default_factory=dict)


def _layer(names: Mapping[str, str]) -> dict[str, str | tuple[str, ...]]:
    return {f"blk.{{}}.{name}": f"{_LAYER}.{logical}" for name, logical in names.items()}


def _experts_of(
    block: str, router: str = "gate", projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, str | tuple[str, ...]]:
    """Router and experts: in stacks, gate and up in one stack, or each by itself as until April 2024."""
    each = {
        part: f"{_LAYER}.{block}.experts.{{}}.{name}"
        for part, name in zip(("gate", "up", "down"), projections, strict=True)
    }
    return {
        "blk.{}.ffn_gate_inp": f"{_LAYER}.{block}.{router}",
        "blk.{}.ffn_gate_up_exps": (each["gate"], each["up"]),
        **{f"blk.{{}}.ffn_{part}_exps": name for part, name in each.items()},
        **{f"blk.{{}}.ffn_{part}.{{}}": name for part, name in each.items()},
    }


_OUTSIDE: dict[str, str | tuple[str, ...]] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ATTENTION = _layer(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
)
_HEAD_NORMS = _layer({"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"})
_MLP = _layer({"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"})
_MLP_NORM = _layer({"ffn_norm": "post_attention_layernorm"})
_LATE_NORM = _layer({"post_attention_norm": "post_attention_layernorm"})
_POST_NORMS = {**_LATE_NORM, **_layer({"post_ffw_norm": "post_feedforward_layernorm"})}
_GEMMA = {**_OUTSIDE, **_ATTENTION, **_POST_NORMS, **_layer({"ffn_norm": "pre_feedforward_layernorm"}), **_MLP}
_GEMMA4_PARTS = {part: f"{_LAYER}.experts.{{}}.{part}_proj" for part in ("gate", "up", "down")}
_GEMMA4 = {
    **_GEMMA,
    **_HEAD_NORMS,
    **_layer(
        {
            "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
            "post_ffw_norm_1": "post_feedforward_layernorm_1",
            "post_ffw_norm_2": "post_feedforward_layernorm_2",
            "ffn_gate_inp": "router.proj",
            "ffn_gate_inp.scale": "router.scale",
            "ffn_down_exps.scale": "router.per_expert_scale",
            "layer_output_scale.weight": "layer_scalar",
            "inp_gate": "per_layer_input_gate",
            "proj": "per_layer_projection",
            "post_norm": "post_per_layer_input_norm",
        }
    ),
    **{f"blk.{{}}.ffn_{part}_exps": name for part, name in _GEMMA4_PARTS.items()},
    "blk.{}.ffn_gate_up_exps": (_GEMMA4_PARTS["gate"], _GEMMA4_PARTS["up"]),
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_SHARED = _layer({f"ffn_{part}_shexp": f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down")})
_SHARED_ONE = _layer({f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")})
_DELTA_NET = {
    **_layer(
        {
            "attn_qkv": "linear_attn.in_proj_qkv",
            "attn_gate": "linear_attn.in_proj_z",
            "ssm_in": "linear_attn.in_proj_qkvz",
            "ssm_ba": "linear_attn.in_proj_ba",
            "ssm_beta": "linear_attn.in_proj_b",
            "ssm_alpha": "linear_attn.in_proj_a",
            "ssm_conv1d": "linear_attn.conv1d",
            "ssm_norm": "linear_attn.norm",
            "ssm_out": "linear_attn.out_proj",
        }
    ),
    "blk.{}.ssm_a": f"{_LAYER}.linear_attn.A_log",
    "blk.{}.ssm_dt.bias": f"{_LAYER}.linear_attn.dt_bias",
}
_GATED_SHARED = {**_SHARED_ONE, **_layer({"ffn_gate_inp_shexp": "mlp.shared_expert_gate"})}
_QWEN_VALUES = {
    **dict.fromkeys(
        ("attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "output_norm"), undoing.without_one
    ),
    "ssm_a": undoing.logarithm,
    "ssm_conv1d": undoing.apart,
}
_HYBRID = {**_OUTSIDE, **_ATTENTION, **_HEAD_NORMS, **_LATE_NORM, **_DELTA_NET}


def _in_language_model(names: Mapping[str, str | tuple[str, ...]]) -> dict[str, str | tuple[str, ...]]:
    def moved(name: str) -> str:
        return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name

    return {key: moved(name) if isinstance(name, str) else tuple(map(moved, name)) for key, name in names.items()}


_CORRECTION = {"blk.{}.exp_probs_b.bias": f"{_LAYER}.mlp.gate.e_score_correction_bias"}
STATICS = "mlp.moe_statics.e_score_correction_bias"  # of ERNIE, `[1, experts]`
_W123 = ("w1", "w3", "w2")
_LLAMA4 = _layer(
    {
        **{f"ffn_{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")},
        **{f"ffn_{part}_shexp": f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
    }
)

_LFM2: dict[str, str | tuple[str, ...]] = {
    "token_embd": "model.embed_tokens",
    "token_embd_norm": "model.embedding_norm",
    "output": "lm_head",
    **_layer(
        {
            "attn_norm": "operator_norm",
            **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v")},
            "attn_output": "self_attn.out_proj",
            **{f"attn_{part}_norm": f"self_attn.{part}_layernorm" for part in ("q", "k")},
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.conv": "conv.conv",
            "shortconv.out_proj": "conv.out_proj",
            "ffn_norm": "ffn_norm",
            **{f"ffn_{part}": f"feed_forward.{name}" for part, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))},
        }
    ),
}
_LFM2_VALUES = {"shortconv.conv": undoing.apart}
_MAMBA = {
    **_layer(
        {
            "ssm_in": "mamba.in_proj",
            "ssm_conv1d": "mamba.conv1d",
            "ssm_norm": "mamba.norm",
            "ssm_out": "mamba.out_proj",
        }
    ),
    "blk.{}.ssm_a": f"{_LAYER}.mamba.A_log",
    "blk.{}.ssm_d": f"{_LAYER}.mamba.D",
    "blk.{}.ssm_dt.bias": f"{_LAYER}.mamba.dt_bias",
}
_MAMBA_VALUES = {
    "ssm_a": undoing.logarithm,
    "ssm_d": undoing.flat,
    "ssm_norm": undoing.flat,
    "ssm_conv1d": undoing.apart,
}

_DENSE = {**_OUTSIDE, **_ATTENTION, **_MLP_NORM, **_MLP}
_MOE = {**_DENSE, **_experts_of("mlp")}

_DEEPSEEK = {
    **_OUTSIDE,
    **_MLP_NORM,
    **_MLP,
    **_experts_of("mlp"),
    **_SHARED,
    **_CORRECTION,
    **_layer(
        {
            "attn_norm": "input_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_q_a": "self_attn.q_a_proj",
            "attn_q_a_norm": "self_attn.q_a_layernorm",
            "attn_q_b": "self_attn.q_b_proj",
            "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
            "attn_kv_a_norm": "self_attn.kv_a_layernorm",
            "attn_kv_b": "self_attn.kv_b_proj",
            "attn_output": "self_attn.o_proj",
        }
    ),
}
_KIMI_DELTA_NET = {
    **_layer(
        {
            **{f"attn_{part}": f"attention.{part}_proj" for part in ("q", "k", "v", "q_a", "q_b", "kv_b")},
            **{f"attn_{part}_norm": f"attention.{part}_layernorm" for part in ("q_a", "kv_a")},
            "attn_kv_a_mqa": "attention.kv_a_proj_with_mqa",
            "attn_output": "attention.o_proj",
            "ssm_f_a": "attention.f_proj",
            "ssm_beta": "attention.b_proj",
            "ssm_norm": "attention.o_norm",
            **{f"ssm_conv1d_{part}": f"attention.{part}_conv1d" for part in "qkv"},
            "ssm_g_a": "attention.g_proj",
            "attn_gate": "attention.g_proj",  # of latent attention
        }
    ),
    "blk.{}.ssm_a": f"{_LAYER}.attention.A_log",
    "blk.{}.ssm_dt.bias": f"{_LAYER}.attention.dt_bias",
}
_KIMI_VALUES = {"ssm_a": undoing.logarithm_of_rate, **{f"ssm_conv1d_{part}": undoing.of_channels for part in "qkv"}}
_INDEXER = _layer(
    {
        "indexer.attn_q_b": "self_attn.indexer.wq_b",
        "indexer.attn_k": "self_attn.indexer.wk",
        "indexer.k_norm": "self_attn.indexer.k_norm",
        "indexer.proj": "self_attn.indexer.weights_proj",
    }
)

NAMINGS: Mapping[str, Naming] = {
    "llama": Naming({**_DENSE, **_experts_of("block_sparse_moe", projections=_W123)}, has_pairs=True),
    "xverse": Naming(_DENSE, has_pairs=True),
    "qwen2": Naming(_DENSE),
    "qwen3": Naming({**_DENSE, **_HEAD_NORMS}),
    "gemma2": Naming(_GEMMA, has_raised_norms=True),
    "gemma3": Naming({**_GEMMA, **_HEAD_NORMS}, has_raised_norms=True),
    "gemma4": Naming(_in_language_model(_GEMMA4)),
    "phi3": Naming(
        {
            **_OUTSIDE,
            **_MLP_NORM,
            **_layer(
                {
                    "attn_norm": "input_layernorm",
                    "attn_qkv": "self_attn.qkv_proj",
                    "attn_output": "self_attn.o_proj",
                    "ffn_up": "mlp.gate_up_proj",
                    "ffn_down": "mlp.down_proj",
                }
            ),
        }
    ),
    "olmo2": Naming({**_OUTSIDE, **_ATTENTION, **_HEAD_NORMS, **_POST_NORMS, **_MLP}),
    "smollm3": Naming(_DENSE, has_pairs=True),
    "seed_oss": Naming({**_OUTSIDE, **_ATTENTION, **_LATE_NORM, **_MLP}),
    "mistral3": Naming(_DENSE, has_pairs=True),
    "ernie4_5": Naming(_DENSE),
    "granite": Naming(_DENSE, has_pairs=True),
    "starcoder2": Naming(
        {**_OUTSIDE, **_ATTENTION, **_MLP_NORM, **_layer({"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})}
    ),
    "qwen2moe": Naming(
        {**_MOE, **_GATED_SHARED},
    ),
    "qwen3moe": Naming({**_MOE, **_HEAD_NORMS}),
    "qwen3next": Naming({**_HYBRID, **_MLP, **_experts_of("mlp"), **_GATED_SHARED}, values=_QWEN_VALUES),
    "qwen35": Naming(_in_language_model({**_HYBRID, **_MLP}), values=_QWEN_VALUES),
    "qwen35moe": Naming(_in_language_model({**_HYBRID, **_experts_of("mlp"), **_GATED_SHARED}), values=_QWEN_VALUES),
    "olmoe": Naming({**_MOE, **_HEAD_NORMS}),
    "phimoe": Naming({**_DENSE, **_experts_of("block_sparse_moe", projections=_W123)}),
    "glm4moe": Naming(
        {**_OUTSIDE, **_ATTENTION, **_HEAD_NORMS, **_LATE_NORM, **_MLP, **_experts_of("mlp"), **_SHARED, **_CORRECTION}
    ),
    "granitemoe": Naming(
        {
            **_DENSE,
            **_experts_of("block_sparse_moe", router="router.layer", projections=_W123),
            **_layer({f"ffn_{part}_shexp": f"shared_mlp.{part}_proj" for part in ("gate", "up", "down")}),
        },
        has_pairs=True,
    ),
    "granitehybrid": Naming(
        {
            **_OUTSIDE,
            **_ATTENTION,
            **_MLP_NORM,
            **_MAMBA,
            **_experts_of("block_sparse_moe", router="router.layer", projections=_W123),
            **_layer(
                {
                    f"ffn_{part}{kind}": f"shared_mlp.{part}_proj"
                    for part in ("gate", "up", "down")
                    for kind in ("", "_shexp")
                }
            ),
        },
        has_pairs=True,
        values=_MAMBA_VALUES,
    ),
    "lfm2": Naming(_LFM2, values=_LFM2_VALUES),
    "lfm2moe": Naming(
        {
            **_LFM2,
            **_experts_of("feed_forward", projections=_W123),
            "blk.{}.exp_probs_b.bias": f"{_LAYER}.feed_forward.expert_bias",
        },
        values=_LFM2_VALUES,
    ),
    "minimax-m2": Naming(
        {
            **_DENSE,
            **_HEAD_NORMS,
            **_experts_of("block_sparse_moe", projections=_W123),
            "blk.{}.exp_probs_b.bias": f"{_LAYER}.block_sparse_moe.e_score_correction_bias",
        }
    ),
    "dots1": Naming({**_MOE, **_HEAD_NORMS, **_SHARED, **_CORRECTION}),
    "exaone-moe": Naming(
        {**_MOE, **_HEAD_NORMS, **_SHARED, "blk.{}.exp_probs_b.bias": f"{_LAYER}.mlp.e_score_correction_bias"}
    ),
    "ernie4_5-moe": Naming({**_MOE, **_SHARED, "blk.{}.exp_probs_b.bias": f"{_LAYER}.{STATICS}"}),
    "hunyuan-moe": Naming(
        {
            **_DENSE,
            **_experts_of("mlp", router="gate.wg"),
            **_layer({"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}),
            **_layer({f"ffn_{part}_shexp": f"mlp.shared_mlp.{part}_proj" for part in ("gate", "up", "down")}),
        }
    ),
    "llama4": Naming(
        {**_OUTSIDE, **_ATTENTION, **_MLP_NORM, **_LLAMA4, **_experts_of("feed_forward", router="router")}
    ),
    "gpt-oss": Naming(
        {
            **_OUTSIDE,
            **_ATTENTION,
            **_LATE_NORM,
            **_experts_of("mlp", router="router"),
            "blk.{}.attn_sinks.weight": f"{_LAYER}.self_attn.sinks",
        }
    ),
    "deepseek2": Naming(_DEEPSEEK),
    "mistral4": Naming(_DEEPSEEK),
    "deepseek32": Naming({**_DEEPSEEK, **_INDEXER}),
    "glm-dsa": Naming({**_DEEPSEEK, **_INDEXER}),
    "bailingmoe3": Naming(
        {
            **_OUTSIDE,
            "token_embd": "model.word_embeddings",
            **_layer({"attn_norm": "input_layernorm"}),
            **_MLP_NORM,
            **_KIMI_DELTA_NET,
            **_MLP,
            **_experts_of("mlp"),
            **_SHARED,
            "blk.{}.exp_probs_b.bias": f"{_LAYER}.mlp.gate.expert_bias",
        },
        values=_KIMI_VALUES,
    ),
    "gpt2": Naming(
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "blk.{}.attn_norm": "transformer.h.{}.ln_1",
            "blk.{}.attn_qkv": "transformer.h.{}.attn.c_attn",
            "blk.{}.attn_output": "transformer.h.{}.attn.c_proj",
            "blk.{}.ffn_norm": "transformer.h.{}.ln_2",
            "blk.{}.ffn_up": "transformer.h.{}.mlp.c_fc",
            "blk.{}.ffn_down": "transformer.h.{}.mlp.c_proj",
        },
        has_transposed=True,
    ),
}
