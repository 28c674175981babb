"""Mistral Large 4, the text part (`MistralLarge4ForConditionalGeneration`): latent attention over the positions that an
indexer chooses, whose queries grow with their positions, head by head; rotations of learned frequencies, and none in
every fourth layer; latent vectors that later layers may share. What sees images is left out.

Logical names are those of Mistral AI's own checkpoints, which transformers saves too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from amalgam.formats.fused import FusedTensor
from amalgam.models.blocks.latent_attention import LatentAttention
from amalgam.models.blocks.mixture import SoftmaxRouter
from amalgam.models.naming import VISION, fused_experts, renamed_tensor, with_biases
from amalgam.models.reading.attention import LatentDefaults, read_indexers, read_latent_attention, with_indexer
from amalgam.models.reading.gemma import read_softcap
from amalgam.models.reading.hybrid import read_text_model, text_config
from amalgam.models.reading.layers import read_expert_counts, read_moe_layers
from amalgam.models.spec import DRAFT_LAYERS, ConfigReader, Family, ModelSpec

# Of the configuration class, where a key is missing.
_LATENT = LatentDefaults(latent_rank=512, nope_dim=64, rope_dim=64, value_dim=128)
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 204800,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "moe_intermediate_size": 6144,
    "num_hidden_layers": 72,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 128,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-5,
    "q_lora_rank": None,
}
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 2048.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


def _read_turns(config: ConfigReader) -> list[int]:
    """1: the layer's heads turn; 0: they do not."""
    count, every = config.int("num_hidden_layers"), config.int("no_rope_layer_interval", default=4)
    turns: list[int] = config.list(
        "no_rope_layers", of=int, what="0 and 1", default=[int(i % every > 0) for i in range(1, count + 1)]
    )
    if len(turns) < count or not set(turns) <= {0, 1}:
        config.refuse("no_rope_layers", turns, f"{count} times 1, or 0 for a layer without rotation")
    return turns[:count]


def _read_sources(config: ConfigReader, turns: list[int]) -> list[int]:
    """Whose latent vectors each layer attends to.

    The class knows one layer with a rotation that others share, and one without; the last one before counts.
    """
    count, what = len(turns), "layers"
    sources: list[int] = config.list("kv_source_layers", of=int, what=what, default=list(range(count)))
    allowed = f"{count} {what}: a layer itself, or the last one before that others share, turning as it does"
    if len(sources) != count:
        config.refuse("kv_source_layers", sources, allowed)
    last: dict[int, int] = {}
    for layer_id, source in enumerate(sources):
        if source != layer_id and last.get(turns[layer_id]) != source:
            config.refuse("kv_source_layers", sources, allowed)
        if source == layer_id and layer_id in sources[layer_id + 1 :]:
            last[turns[layer_id]] = layer_id
    return sources


def _read_attentions(config: ConfigReader) -> list[LatentAttention]:
    config.expect("q_lora_rank", None)
    config.expect("indexer_rope_interleave", True)
    latent = read_latent_attention(config, is_interleaved=True, defaults=_LATENT)
    latent = replace(latent, norm_eps=config.float("rms_norm_eps", low=0), has_head_scales=True)
    latent = with_indexer(config, latent, default_heads=32, default_interleaved=True, reads_stream=True)
    assert latent.indexer is not None
    turning = replace(latent, indexer=replace(latent.indexer, has_head_scales=True))
    still = replace(turning, rope=None, rope_dim=0, nope_dim=turning.nope_dim + turning.rope_dim)
    turns = _read_turns(config)
    sources = _read_sources(config, turns)
    return [
        replace(
            turning if does_turn else still,
            source=None if source == layer_id else source,
            is_source=source == layer_id and layer_id in sources[layer_id + 1 :],
            indexer=turning.indexer if has_indexer else None,
        )
        for layer_id, (does_turn, source, has_indexer) in enumerate(
            zip(turns, sources, read_indexers(config), strict=True)
        )
    ]


def _read_spec(config: ConfigReader) -> ModelSpec:
    text = text_config(config).completed(_DEFAULTS)
    if text.get("rope_parameters") is None and text.get("rope_scaling") is None:
        text = ConfigReader({**text.values, "rope_parameters": _ROPE}, text.where, text.path)
    text.expect("n_group", 1)
    text.expect("topk_group", 1)
    router = SoftmaxRouter(
        *read_expert_counts(text),
        normalises=True,
        sum_eps=1e-20,
        scaling=text.float("routed_scaling_factor", default=1.0),
    )
    attentions = _read_attentions(text)
    layers = read_moe_layers(text, attentions, router, default_dense=1, default_shared=1)
    return replace(
        read_text_model(config, text, "mistral_large4", layers),
        logits_softcap=read_softcap(text, "final_logit_softcapping", 30.0),
        rope_growth=text.int("qk_rope_head_dim", default=_LATENT.rope_dim) // 2,
    )


_LAYER, _IN_MEMORY = "layers.{}", "model.language_model.layers.{}"
_PARTS = {"gate": "w1", "up": "w3", "down": "w2"}
_NAMES = {
    "embedding": "tok_embeddings.weight",
    "rope_growth": "lerope.alpha",
    "norm": "norm.weight",
    "head": "output.weight",
    "layers.{}.attention_norm": f"{_LAYER}.attention_norm.weight",
    "layers.{}.mlp_norm": f"{_LAYER}.ffn_norm.weight",
    "layers.{}.attention.q": f"{_LAYER}.attention.wq.weight",
    "layers.{}.attention.kv_a_norm": f"{_LAYER}.attention.kv_a_norm.weight",
    "layers.{}.attention.kv_b": f"{_LAYER}.attention.wkv_b.weight",
    **with_biases(
        {
            "layers.{}.attention.kv_a": f"{_LAYER}.attention.wkv_a_with_mqa.weight",
            "layers.{}.attention.o": f"{_LAYER}.attention.wo.weight",
            "layers.{}.attention.index_k_norm": f"{_LAYER}.attention.indexer.k_norm.weight",
            "layers.{}.attention.index_query_norm": f"{_LAYER}.attention.indexer.q_input_norm.weight",
        }
    ),
    "layers.{}.attention.scales": f"{_LAYER}.attention.ssmax_scaling.s",
    "layers.{}.attention.scales_bias": f"{_LAYER}.attention.ssmax_scaling.b",
    "layers.{}.attention.index_query": f"{_LAYER}.attention.indexer.wq_b.weight",
    "layers.{}.attention.index_k": f"{_LAYER}.attention.indexer.wk.weight",
    "layers.{}.attention.index_weights": f"{_LAYER}.attention.indexer.weights_proj.weight",
    "layers.{}.attention.index_scales": f"{_LAYER}.attention.indexer.ssmax_scaling.s",
    "layers.{}.attention.index_scales_bias": f"{_LAYER}.attention.indexer.ssmax_scaling.b",
    "layers.{}.mlp.router": f"{_LAYER}.gate.weight",
    **{f"layers.{{}}.mlp.{part}": f"{_LAYER}.feed_forward.{name}.weight" for part, name in _PARTS.items()},
    **{f"layers.{{}}.mlp.shared.{part}": f"{_LAYER}.shared_experts.{name}.weight" for part, name in _PARTS.items()},
    **{f"layers.{{}}.mlp.experts.{{}}.{part}": f"{_LAYER}.experts.{{}}.{name}.weight" for part, name in _PARTS.items()},
}
# As transformers has them in memory.
_MODULES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    **{
        f"attention.indexer.{name}": f"self_attn.indexer.{name}"
        for name in ("wq_b", "wk", "weights_proj", "k_norm", "q_input_norm")
    },
    "gate": "mlp.gate",
    **{f"feed_forward.{name}": f"mlp.{part}_proj" for part, name in _PARTS.items()},
    **{f"shared_experts.{name}": f"mlp.shared_experts.{part}_proj" for part, name in _PARTS.items()},
}
_SCALES = {
    f"{inner}.ssmax_scaling.{short}": f"{outer}.softmax_scaling.{name}"
    for inner, outer in (("attention", "self_attn"), ("attention.indexer", "self_attn.indexer"))
    for short, name in (("s", "scale"), ("b", "bias"))
}
_RENAMED = (
    FusedTensor("model.language_model.embed_tokens", ("tok_embeddings",), is_stacked=False),
    FusedTensor("model.language_model.norm", ("norm",), is_stacked=False),
    FusedTensor("lm_head", ("output",), is_stacked=False),
    renamed_tensor("model.language_model.rotary_emb.alpha", "lerope.alpha"),
    *(
        FusedTensor(f"{_IN_MEMORY}.{stored}", (f"{_LAYER}.{logical}",), is_stacked=False)
        for logical, stored in _MODULES.items()
    ),
    *(renamed_tensor(f"{_IN_MEMORY}.{stored}", f"{_LAYER}.{logical}") for logical, stored in _SCALES.items()),
)

FAMILY = Family(
    name="mistral_large4",
    architectures=("MistralLarge4ForConditionalGeneration",),
    read_spec=_read_spec,
    names=_NAMES,
    fused=(
        *fused_experts(f"{_LAYER}.experts.{{}}", ("w1", "w3", "w2"), stored=f"{_IN_MEMORY}.mlp.experts"),
        *_RENAMED,
    ),
    left_out={
        **{
            rf"{part}\..*": "the vision encoder"
            for part in ("vision_encoder", "pre_mm_projector_norm", "patch_merger", "vision_language_adapter")
        },
        **VISION,
        r"mtp_dspark\..*": DRAFT_LAYERS,
    },
    tiny_config={
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "index_topk": 128,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "indexer_types": ["full", "shared", "full", "full"],
        "routed_scaling_factor": 1.3,
        "final_logit_softcapping": 3.0,
        "rope_parameters": {**_ROPE, "factor": 8.0, "original_max_position_embeddings": 32},
    },
)
