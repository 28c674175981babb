"""Phi-3, Phi-3.5 and Phi-4 (`Phi3ForCausalLM`): Llama with fused projections, part of a head rotary, LongRoPE.

Abdin et al. 2024, "Phi-3 Technical Report"; Microsoft 2025, "Phi-4-Mini Technical Report".
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.attention import FusedAttention
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import DECODER, FUSED_ATTENTION, FUSED_MLP
from amalgam.models.reading.attention import read_attention, read_window
from amalgam.models.reading.layers import read_model
from amalgam.models.reading.rope import RopeSettings
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

NORM_EPS = 1e-5


def _read_spec(config: ConfigReader) -> ModelSpec:
    kind = RopeSettings(config).kind
    if kind not in ("default", "longrope"):
        config.refuse("rope_parameters.rope_type", kind, "default or longrope for this family")
    common = read_attention(
        config.completed({"original_max_position_embeddings": 4096}), default_rotary=1.0, default_eps=NORM_EPS
    )
    attention = replace(FusedAttention(**vars(common)), window=read_window(config))
    layer = LayerSpec(attention, DenseMlp(config.int("intermediate_size"), is_fused=True))
    return read_model(config, "phi3", (layer,) * config.int("num_hidden_layers"), default_eps=NORM_EPS)


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **FUSED_ATTENTION, **FUSED_MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "partial_rotary_factor": 0.75},
)
