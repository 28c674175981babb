"""Mistral 4, text (`Mistral4ForCausalLM`): latent attention whose queries grow with positions, softmax routing."""

from __future__ import annotations

from amalgam.models.naming import DECODER, EXPERTS, FUSED_EXPERTS, LATENT_ATTENTION, MLP, SHARED_EXPERTS
from amalgam.models.reading.mistral import BETA, read_mistral4
from amalgam.models.spec import Family

FAMILY = Family(
    name="mistral4",
    architectures=("Mistral4ForCausalLM",),
    read_spec=read_mistral4,
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
            BETA: 0.1,
        },
    },
)
