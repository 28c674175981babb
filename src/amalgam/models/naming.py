"""Published names that most families share, as slot pattern → checkpoint name (see `Family.names`).

Biases of a projection follow from its weight: a slot `q_bias` is published as `….q_proj.bias`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from amalgam.formats.fused import FusedTensor

_LAYER = "model.layers.{}"

DECODER = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers.{}.attention_norm": f"{_LAYER}.input_layernorm.weight",
    "layers.{}.mlp_norm": f"{_LAYER}.post_attention_layernorm.weight",
}
# How the text part of LLaVA's relatives is called, before transformers 4.52 and since, and what is beside it.
LANGUAGE_MODEL = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
VISION = {
    rf"(model\.)?{part}\..*": "the vision encoder" for part in ("vision_tower", "multi_modal_projector", "vision_model")
}

# Norms on what the blocks add to the stream, with none before them (OLMo 2), and with one before each (Gemma 2).
_POST_NORMS = {
    "layers.{}.attention_post_norm": f"{_LAYER}.post_attention_layernorm.weight",
    "layers.{}.mlp_post_norm": f"{_LAYER}.post_feedforward_layernorm.weight",
}
POST_NORM_DECODER = {**{slot: DECODER[slot] for slot in ("embedding", "norm", "head")}, **_POST_NORMS}
SANDWICH_DECODER = {**DECODER, "layers.{}.mlp_norm": f"{_LAYER}.pre_feedforward_layernorm.weight", **_POST_NORMS}


def with_biases(names: Mapping[str, str]) -> dict[str, str]:
    """The same names and those of the biases beside them."""
    biases = {f"{slot}_bias": f"{name.removesuffix('.weight')}.bias" for slot, name in names.items()}
    return {**names, **biases}


ATTENTION = with_biases(
    {f"layers.{{}}.attention.{part}": f"{_LAYER}.self_attn.{part}_proj.weight" for part in ("q", "k", "v", "o")}
)
HEAD_NORMS = {f"layers.{{}}.attention.{part}": f"{_LAYER}.self_attn.{part}.weight" for part in ("q_norm", "k_norm")}
FUSED_ATTENTION = with_biases(
    {f"layers.{{}}.attention.{part}": f"{_LAYER}.self_attn.{part}_proj.weight" for part in ("qkv", "o")}
)
FUSED_MLP = with_biases({f"layers.{{}}.mlp.{part}": f"{_LAYER}.mlp.{part}_proj.weight" for part in ("gate_up", "down")})
MLP = with_biases({f"layers.{{}}.mlp.{part}": f"{_LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")})
EXPERTS = {
    "layers.{}.mlp.router": f"{_LAYER}.mlp.gate.weight",
    **{
        f"layers.{{}}.mlp.experts.{{}}.{part}": f"{_LAYER}.mlp.experts.{{}}.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}
# Mixtral's: w1 is gate, w3 up, w2 down.
NUMBERED_EXPERTS = {
    "layers.{}.mlp.router": f"{_LAYER}.block_sparse_moe.gate.weight",
    **{
        f"layers.{{}}.mlp.experts.{{}}.{part}": f"{_LAYER}.block_sparse_moe.experts.{{}}.{published}.weight"
        for part, published in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}
SHARED_EXPERTS = {
    f"layers.{{}}.mlp.shared.{part}": f"{_LAYER}.mlp.shared_experts.{part}_proj.weight"
    for part in ("gate", "up", "down")
}
CORRECTED_EXPERTS = {
    **EXPERTS,
    **SHARED_EXPERTS,
    "layers.{}.mlp.router_correction": f"{_LAYER}.mlp.gate.e_score_correction_bias",
}
LATENT_ATTENTION = {
    "layers.{}.attention.q": f"{_LAYER}.self_attn.q_proj.weight",
    "layers.{}.attention.q_b": f"{_LAYER}.self_attn.q_b_proj.weight",
    "layers.{}.attention.kv_b": f"{_LAYER}.self_attn.kv_b_proj.weight",
    "layers.{}.attention.q_a_norm": f"{_LAYER}.self_attn.q_a_layernorm.weight",
    "layers.{}.attention.kv_a_norm": f"{_LAYER}.self_attn.kv_a_layernorm.weight",
    **with_biases(
        {
            "layers.{}.attention.q_a": f"{_LAYER}.self_attn.q_a_proj.weight",
            "layers.{}.attention.kv_a": f"{_LAYER}.self_attn.kv_a_proj_with_mqa.weight",
            "layers.{}.attention.o": f"{_LAYER}.self_attn.o_proj.weight",
        }
    ),
}
INDEXER = {
    "layers.{}.attention.index_q": f"{_LAYER}.self_attn.indexer.wq_b.weight",
    "layers.{}.attention.index_k": f"{_LAYER}.self_attn.indexer.wk.weight",
    "layers.{}.attention.index_weights": f"{_LAYER}.self_attn.indexer.weights_proj.weight",
    **with_biases({"layers.{}.attention.index_k_norm": f"{_LAYER}.self_attn.indexer.k_norm.weight"}),
}


def fused_experts(
    logical: str,
    parts: tuple[str, str, str],
    *,
    is_transposed: bool = False,
    is_interleaved: bool = False,
    stored: str = f"{_LAYER}.mlp.experts",
) -> tuple[FusedTensor, ...]:
    """All experts of a layer in two tensors, as transformers 5 keeps them in memory and publishes newer models.

    Args:
        logical: the experts' logical prefix, `model.layers.{}.mlp.experts.{}`.
        parts: logical names of gate, up and down.
        stored: the two tensors' prefix.
    """
    gate, up, down = (f"{logical}.{part}" for part in parts)
    return (
        FusedTensor(f"{stored}.gate_up_proj", (gate, up), True, is_transposed, is_interleaved),
        FusedTensor(f"{stored}.down_proj", (down,), True, is_transposed),
    )


def renamed_tensor(stored: str, logical: str) -> FusedTensor:
    """One wide tensor that some checkpoints have under another name."""
    return FusedTensor(stored, (logical,), is_stacked=False, is_tensor=True)


# Qwen's: one MLP beside the experts, whose gate is a projection to one number.
GATED_SHARED_EXPERT = {
    "layers.{}.mlp.shared_gate": f"{_LAYER}.mlp.shared_expert_gate.weight",
    **{
        f"layers.{{}}.mlp.shared.{part}": f"{_LAYER}.mlp.shared_expert.{part}_proj.weight"
        for part in ("gate", "up", "down")
    },
}
DELTA_NET = {
    **{
        f"layers.{{}}.attention.{part}": f"{_LAYER}.linear_attn.in_proj_{part}.weight"
        for part in ("qkvz", "ba", "qkv", "z", "b", "a")
    },
    "layers.{}.attention.convolution": f"{_LAYER}.linear_attn.conv1d.weight",
    "layers.{}.attention.log_rate": f"{_LAYER}.linear_attn.A_log",
    "layers.{}.attention.decay_bias": f"{_LAYER}.linear_attn.dt_bias",
    "layers.{}.attention.norm": f"{_LAYER}.linear_attn.norm.weight",
    "layers.{}.attention.out": f"{_LAYER}.linear_attn.out_proj.weight",
}


def in_language_model(names: Mapping[str, str]) -> dict[str, str]:
    """The same names in a multimodal model, whose text part is `model.language_model`."""
    return {slot: _in_language_model(name) for slot, name in names.items()}


def fused_in_language_model(table: Sequence[FusedTensor]) -> tuple[FusedTensor, ...]:
    """The same fused tensors in a multimodal model, stored under its names or under those of its text part alone."""
    logical = [replace(fused, modules=tuple(map(_in_language_model, fused.modules))) for fused in table]
    return *logical, *(replace(fused, stored=_in_language_model(fused.stored)) for fused in logical)


def _in_language_model(name: str) -> str:
    return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name


def stored_in_language_model(table: Sequence[FusedTensor]) -> tuple[FusedTensor, ...]:
    """The same fused tensors, also stored under `LANGUAGE_MODEL`'s names."""
    prefixes = {"": "", **LANGUAGE_MODEL}
    return tuple(
        replace(fused, stored=short + fused.stored.removeprefix(whole))
        for short, whole in prefixes.items()
        for fused in table
        if fused.stored.startswith(whole)
    )


_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FUSED_EXPERTS = fused_experts(f"{_LAYER}.mlp.experts.{{}}", _PROJECTIONS)
# gpt-oss: wide experts lie `[in, out]`, and gate and up alternate in any precision.
FUSED_ALTERNATING_EXPERTS = fused_experts(
    f"{_LAYER}.mlp.experts.{{}}", _PROJECTIONS, is_transposed=True, is_interleaved=True
)
_NUMBERED = f"{_LAYER}.block_sparse_moe.experts.{{}}"
# Mixtral's under the names of transformers 5, which also renames the router; llm-compressor publishes its experts, and
# whoever else quantizes them one by one, under those of other families.
FUSED_NUMBERED_EXPERTS = (
    *fused_experts(_NUMBERED, ("w1", "w3", "w2")),
    *(
        FusedTensor(f"{_LAYER}.mlp.{router}", (f"{_LAYER}.block_sparse_moe.gate",), is_stacked=False)
        for router in ("gate", "router")
    ),
    *(
        FusedTensor(f"{_LAYER}.mlp.experts.{{}}.{part}", (f"{_NUMBERED}.{published}",), is_stacked=False)
        for part, published in zip(_PROJECTIONS, ("w1", "w3", "w2"), strict=True)
    ),
)
