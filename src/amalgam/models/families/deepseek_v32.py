"""DeepSeek-V3.2 (`DeepseekV32ForCausalLM`): V3 whose tokens attend to the positions that an indexer chooses.

DeepSeek-AI 2025, "DeepSeek-V3.2", section 2.1. Index keys and queries are kept as they are: the published code rotates
both by a Hadamard matrix, which no score notices, and rounds them to 8 bits.
"""

from __future__ import annotations

from amalgam.models.naming import CORRECTED_EXPERTS, DECODER, FUSED_EXPERTS, INDEXER, LATENT_ATTENTION, MLP
from amalgam.models.reading.attention import read_latent_attention, with_indexer
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers, with_draft_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_latent_attention(config, is_interleaved=True)
    attention = with_indexer(config, attention, default_heads=64, default_interleaved=False)
    router = read_corrected_router(config, default_groups=8, default_kept=4, default_scaling=2.5)
    layers = read_moe_layers(config, attention, router, default_dense=3, default_shared=1)
    return with_draft_layers(config, read_model(config, "deepseek_v32", layers))


FAMILY = Family(
    name="deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **LATENT_ATTENTION, **INDEXER, **MLP, **CORRECTED_EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "index_topk": 128,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "num_nextn_predict_layers": 0,
    },
)
