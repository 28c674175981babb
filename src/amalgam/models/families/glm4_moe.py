"""GLM-4.5 and 4.6 (`Glm4MoeForCausalLM`): grouped queries with half the head rotary, DeepSeek-V3's experts."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.naming import ATTENTION, CORRECTED_EXPERTS, DECODER, FUSED_EXPERTS, HEAD_NORMS, MLP
from amalgam.models.reading.attention import read_attention
from amalgam.models.reading.layers import read_corrected_router, read_model, read_moe_layers, with_draft_layers
from amalgam.models.spec import ConfigReader, Family, ModelSpec

NORM_EPS = 1e-5


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = replace(
        read_attention(config, default_eps=NORM_EPS, default_rotary=0.5, default_kv_heads=8),
        has_qkv_bias=config.bool("attention_bias", default=False),
        has_head_norm=config.bool("use_qk_norm", default=False),
    )
    router = read_corrected_router(config)
    layers = read_moe_layers(config, attention, router, default_dense=1, default_shared=1)
    return with_draft_layers(config, read_model(config, "glm4_moe", layers, default_eps=NORM_EPS))


FAMILY = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **HEAD_NORMS, **MLP, **CORRECTED_EXPERTS},
    fused=FUSED_EXPERTS,
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "num_nextn_predict_layers": 0,
    },
)
