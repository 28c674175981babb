"""GLM-5 (`GlmMoeDsaForCausalLM`): DeepSeek-V3.2's sparse attention, GLM's experts, fewer indexers than layers.

A layer without an indexer attends to what the last one before it has chosen (arXiv:2603.12201).
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.latent_attention import LatentAttention
from amalgam.models.naming import CORRECTED_EXPERTS, DECODER, FUSED_EXPERTS, INDEXER, LATENT_ATTENTION, MLP
from amalgam.models.reading.attention import LatentDefaults, read_indexers, read_latent_attention, with_indexer
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers, with_draft_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec

NORM_EPS = 1e-5
# Of the configuration class, where a key is missing.
DEFAULTS = LatentDefaults(query_rank=2048, nope_dim=192, value_dim=256)


def _read_attentions(config: ConfigReader) -> list[LatentAttention]:
    """Of each layer: with an indexer of its own or without."""
    latent = read_latent_attention(config, is_interleaved=True, defaults=DEFAULTS)
    full = with_indexer(config, latent, default_heads=32, default_interleaved=True)
    return [full if has_one else replace(full, indexer=None) for has_one in read_indexers(config)]


def _read_spec(config: ConfigReader) -> ModelSpec:
    config.expect("index_kpool", 1)
    router = read_corrected_router(config, default_scaling=2.5)
    layers = read_moe_layers(config, _read_attentions(config), router, default_dense=3, default_shared=1)
    return with_draft_layers(config, read_model(config, "glm_moe_dsa", layers, default_eps=NORM_EPS))


FAMILY = Family(
    name="glm_moe_dsa",
    architectures=("GlmMoeDsaForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **LATENT_ATTENTION, **INDEXER, **MLP, **CORRECTED_EXPERTS},
    fused=FUSED_EXPERTS,
    left_out={r"model\.layers\.\d+\.self_attn\.indexer\..*": "an indexer that its layer does not use"},
    tiny_config={
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "index_topk": 128,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "indexer_types": ["full", "shared"],
        "num_nextn_predict_layers": 0,
    },
)
