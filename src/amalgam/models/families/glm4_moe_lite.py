"""GLM-4.7-Flash (`Glm4MoeLiteForCausalLM`): DeepSeek-V3's latent attention, GLM-4.5's experts."""

from __future__ import annotations

from amalgam.models.naming import CORRECTED_EXPERTS, DECODER, FUSED_EXPERTS, LATENT_ATTENTION, MLP
from amalgam.models.reading.attention import LatentDefaults, read_latent_attention
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers, with_draft_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec

NORM_EPS = 1e-5
# Of the configuration class, where a key is missing.
DEFAULTS = LatentDefaults(query_rank=768, nope_dim=192, value_dim=256)


def _read_spec(config: ConfigReader) -> ModelSpec:
    is_interleaved = config.bool("rope_interleave", default=True)
    attention = read_latent_attention(config, is_interleaved=is_interleaved, defaults=DEFAULTS)
    router = read_corrected_router(config, default_scaling=1.8)
    layers = read_moe_layers(config, attention, router, default_dense=1, default_shared=1)
    return with_draft_layers(config, read_model(config, "glm4_moe_lite", layers, default_eps=NORM_EPS))


FAMILY = Family(
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
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
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "num_nextn_predict_layers": 0,
        "rms_norm_eps": 1e-5,
    },
)
