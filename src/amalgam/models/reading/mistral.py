"""Mistral 4, by itself and as the text part of a multimodal model."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mixture import SoftmaxRouter
from amalgam.models.reading.attention import LatentDefaults, read_latent_attention
from amalgam.models.reading.layers import read_expert_counts, read_model, read_moe_layers
from amalgam.models.reading.rope import RopeSettings
from amalgam.models.spec import ConfigReader, ModelSpec

BETA = "llama_4_scaling_beta"  # how queries grow with their positions
# Of the configuration class, where a key is missing.
_DEFAULTS = LatentDefaults(query_rank=1024, latent_rank=256, nope_dim=64, rope_dim=64, value_dim=128)


def read_mistral4(config: ConfigReader) -> ModelSpec:
    """Latent attention whose queries grow with positions, softmax routing."""
    settings = RopeSettings(config)
    if settings.kind != "yarn":
        config.refuse("rope_parameters", settings.kind, "the settings of YaRN")
    common = read_latent_attention(
        config,
        is_interleaved=config.bool("rope_interleave", default=True),
        defaults=_DEFAULTS,
        says_share=True,
        rope_settings=frozenset({BETA, "max_position_embeddings"}),
    )
    attention = replace(common, sharpening=(settings.number(BETA), int(settings.original_max_positions())))
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
