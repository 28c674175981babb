"""Ministral 3 (`Ministral3ForCausalLM`): Mistral with YaRN, and queries that grow with their positions.

And the text part of `Mistral3ForConditionalGeneration`, which is that or, in Mistral Small 3.1 and 3.2, plain Mistral.
What sees images is left out.
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, LANGUAGE_MODEL, MLP, VISION
from amalgam.models.reading.attention import read_attention, read_window
from amalgam.models.reading.hybrid import text_config
from amalgam.models.reading.layers import read_model
from amalgam.models.reading.rope import RopeSettings
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-5
WINDOW = 4096  # Mistral's default, where the key is missing
_BETA = "llama_4_scaling_beta"


def _read_spec(config: ConfigReader) -> ModelSpec:
    text = text_config(config)
    return _read_mistral(text) if text.get("model_type") == "mistral" else _read_ministral(text)


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
        rope_settings=frozenset({_BETA, "max_position_embeddings"}),
    )
    length = settings.number("original_max_position_embeddings", above=1)
    config.expect("original_max_position_embeddings", length)  # the class has both, for rotation and queries
    attention = replace(common, window=read_window(config), sharpening=(settings.number(_BETA), int(length)))
    layer = LayerSpec(attention, DenseMlp(config.int("intermediate_size")))
    return read_model(config, "ministral3", (layer,) * config.int("num_hidden_layers"), default_eps=NORM_EPS)


FAMILY = Family(
    name="ministral3",
    architectures=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
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
            _BETA: 0.1,
        },
    },
)
