"""Gemma 2 (`Gemma2ForCausalLM`): a window in every other layer, scores and logits capped by a tanh.

Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size".
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.naming import ATTENTION, MLP, SANDWICH_DECODER
from amalgam.models.reading.attention import by_layer_type, every_nth_full, read_window
from amalgam.models.reading.gemma import read_gemma, read_gemma_attention, read_softcap
from amalgam.models.spec import ConfigReader, Family, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = replace(
        read_gemma_attention(config), softcap=read_softcap(config, "attn_logit_softcapping", default=50.0)
    )
    window = read_window(config, default=4096)
    attentions = by_layer_type(config, attention, window, every_nth_full(config, 2))
    return read_gemma(config, "gemma2", attentions, default_softcap=30.0)


FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    read_spec=_read_spec,
    names={**SANDWICH_DECODER, **ATTENTION, **MLP},
    tiny_config={
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 128,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
)
