"""Mistral 4, text (`Mistral4ForCausalLM`): latent attention whose queries grow with positions, softmax routing."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mixture import SoftmaxRouter
from amalgam.models.naming import DECODER, EXPERTS, FUSED_EXPERTS, LATENT_ATTENTION, MLP, SHARED_EXPERTS
from amalgam.models.reading.attention import LatentDefaults, read_latent_attention
from amalgam.models.reading.layers import read_expert_counts, read_model, read_moe_layers
from amalgam.models.reading.rope import RopeSettings
from amalgam.models.spec import ConfigReader, Family, ModelSpec

# Of the configuration class, where a key is missing.
DEFAULTS = LatentDefaults(query_rank=1024, latent_rank=256, nope_dim=64, rope_dim=64, value_dim=128)
_BETA = "llama_4_scaling_beta"


def _read_spec(config: ConfigReader) -> ModelSpec:
    settings = RopeSettings(config)
    if settings.kind != "yarn":
        config.refuse("rope_parameters", settings.kind, "the settings of YaRN")
    common = read_latent_attention(
        config,
        is_interleaved=config.bool("rope_interleave", default=True),
        defaults=DEFAULTS,
        says_share=True,
        rope_settings=frozenset({_BETA, "max_position_embeddings"}),
    )
    attention = replace(common, sharpening=(settings.number(_BETA), int(settings.original_max_positions())))
    config.expect("n_group", 1)
    config.expect("topk_group", 1)
    router = SoftmaxRouter(
        *read_expert_counts(config),
        normalises=config.bool("norm_topk_prob", default=True),
        sum_eps=1e-20,
        scaling=config.float("routed_scaling_factor", default=1.0),
    )
    layers = read_moe_layers(config, attention, router, default_dense=0, default_shared=1)
    return read_model(config, "mistral4", layers)


FAMILY = Family(
    name="mistral4",
    architectures=("Mistral4ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **LATENT_ATTENTION, **MLP, **EXPERTS, **SHARED_EXPERTS},
    fused=FUSED_EXPERTS,
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
        "v_head_dim": 16,
        "routed_scaling_factor": 1.3,
        "rope_parameters": {
            "type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            _BETA: 0.1,
        },
    },
)
