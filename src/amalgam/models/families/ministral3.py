"""Ministral 3 (`Ministral3ForCausalLM`): Mistral with YaRN, and queries that grow with their positions.

And the text part of `Mistral3ForConditionalGeneration`, which is that or, in Mistral Small 3.1 and 3.2, plain Mistral,
or Mistral 4. What sees images is left out.
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import (
    ATTENTION,
    DECODER,
    EXPERTS,
    FUSED_EXPERTS,
    LANGUAGE_MODEL,
    LATENT_ATTENTION,
    MLP,
    SHARED_EXPERTS,
    VISION,
    stored_in_language_model,
)
from amalgam.models.reading.attention import read_attention, read_window
from amalgam.models.reading.layers import read_model
from amalgam.models.reading.mistral import BETA, read_mistral4
from amalgam.models.reading.rope import RopeSettings
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-5
WINDOW = 4096  # Mistral's default, where the key is missing


def _read_spec(config: ConfigReader) -> ModelSpec:
    text = config.object("text_config", default=None)
    if text is None:
        kind = config.get("model_type", default="ministral3")
    else:
        config, kind = text, text.get("model_type", default="mistral")  # as `Mistral3Config` has it
    if not isinstance(kind, str) or kind not in _READERS:
        config.refuse("model_type", kind, " or ".join(_READERS))
    return _READERS[kind](config)


def _read_mistral(config: ConfigReader) -> ModelSpec:
    window = read_window(config, default=WINDOW)
    attention = replace(read_attention(config, default_kv_heads=8), window=window)
    layer = LayerSpec(attention, DenseMlp(config.int("intermediate_size")))
    return read_model(config, "ministral3", (layer,) * config.int("num_hidden_layers"))


def _read_ministral(config: ConfigReader) -> ModelSpec:
    settings = RopeSettings(config)
    if settings.kind != "yarn":
        config.refuse("rope_parameters", settings.kind, "the settings of YaRN")
    common = read_attention(
        config,
        default_theta=1e6,
        default_head_dim=128,
        default_kv_heads=8,
        default_eps=NORM_EPS,
        rope_settings=frozenset({BETA, "max_position_embeddings"}),
    )
    length = settings.number("original_max_position_embeddings", above=1)
    config.expect("original_max_position_embeddings", length)  # the class has both, for rotation and queries
    attention = replace(common, window=read_window(config), sharpening=(settings.number(BETA), int(length)))
    layer = LayerSpec(attention, DenseMlp(config.int("intermediate_size")))
    return read_model(config, "ministral3", (layer,) * config.int("num_hidden_layers"), default_eps=NORM_EPS)


_READERS = {"mistral": _read_mistral, "ministral3": _read_ministral, "mistral4": read_mistral4}

FAMILY = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **LATENT_ATTENTION, **MLP, **EXPERTS, **SHARED_EXPERTS},
    fused=stored_in_language_model(FUSED_EXPERTS),
    left_out=VISION,
    short_prefixes=LANGUAGE_MODEL,
    tiny_config={
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "head_dim": 32,
        "rope_parameters": {
            "type": "yarn",
            "rope_theta": 1e6,
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
