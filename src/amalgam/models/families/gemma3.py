"""Gemma 3, text and the text part (`Gemma3ForCausalLM`, `Gemma3ForConditionalGeneration`): five layers of six with a
window and a rotation of their own, normed heads. What sees images is left out.

Gemma Team 2025, "Gemma 3 Technical Report".
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.naming import ATTENTION, HEAD_NORMS, LANGUAGE_MODEL, MLP, SANDWICH_DECODER, VISION
from amalgam.models.reading.attention import by_layer_type, every_nth_full, read_window
from amalgam.models.reading.gemma import read_gemma, read_gemma_attention
from amalgam.models.reading.hybrid import text_config
from amalgam.models.spec import ConfigReader, Family, ModelSpec

# What published configurations leave to the class.
_DEFAULTS = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "max_position_embeddings": 131072,
}


def _read_spec(config: ConfigReader) -> ModelSpec:
    config = text_config(config).completed(_DEFAULTS)
    if (cap := config.get("attn_logit_softcapping")) is not None:
        config.refuse("attn_logit_softcapping", cap, "null for this family, whose class does not apply it")
    full = read_gemma_attention(config, default_theta=1e6, layer_type="full_attention")
    local = read_gemma_attention(config, layer_type="sliding_attention", theta_key="rope_local_base_freq")
    full, local = (replace(one, has_head_norm=True, head_norm_adds_one=True) for one in (full, local))
    types = every_nth_full(config, config.int("sliding_window_pattern", default=6))
    attentions = by_layer_type(config, local, read_window(config, default=4096), types, full)
    return read_gemma(config, "gemma3", attentions, default_softcap=None)


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    read_spec=_read_spec,
    names={**SANDWICH_DECODER, **ATTENTION, **HEAD_NORMS, **MLP},
    left_out=VISION,
    short_prefixes=LANGUAGE_MODEL,
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
)
