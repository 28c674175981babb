"""DeepSeek-V3 and R1 (`DeepseekV3ForCausalLM`): V2's attention, sigmoid routing with a correction bias per expert.

DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2. The layers for multi-token prediction are not loaded.
"""

from __future__ import annotations

from amalgam.models.naming import CORRECTED_EXPERTS, DECODER, FUSED_EXPERTS, LATENT_ATTENTION, MLP
from amalgam.models.reading.attention import read_latent_attention
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers, with_draft_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_latent_attention(config, is_interleaved=config.bool("rope_interleave", default=True))
    router = read_corrected_router(config, default_groups=8, default_kept=4, default_scaling=2.5)
    layers = read_moe_layers(config, attention, router, default_dense=3, default_shared=1)
    return with_draft_layers(config, read_model(config, "deepseek_v3", layers))


FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **LATENT_ATTENTION, **MLP, **CORRECTED_EXPERTS},
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
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
    },
)
