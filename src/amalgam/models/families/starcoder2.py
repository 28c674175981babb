"""StarCoder2 (`Starcoder2ForCausalLM`): LayerNorm and biases throughout, an MLP without gate, grouped queries.

Lozhkov et al. 2024, "StarCoder 2 and The Stack v2".
"""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import GeluMlp
from amalgam.models.blocks.norms import LayerNorm
from amalgam.models.naming import ATTENTION, DECODER, with_biases
from amalgam.models.reading.attention import read_attention, read_window
from amalgam.models.reading.layers import GELU, read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_spec(config: ConfigReader) -> ModelSpec:
    has_bias = config.bool("use_bias", default=True)
    attention = replace(read_attention(config, default_kv_heads=2, has_bias=has_bias), window=read_window(config))
    layer = LayerSpec(attention, GeluMlp(config.int("intermediate_size"), has_bias=has_bias))
    layers = (layer,) * config.int("num_hidden_layers")
    spec = read_model(config, "starcoder2", layers, default_tied=True, activations=GELU)
    return replace(spec, norm=LayerNorm(config.float("norm_epsilon", default=1e-5, low=0)))


FAMILY = Family(
    name="starcoder2",
    architectures=("Starcoder2ForCausalLM",),
    read_spec=_read_spec,
    names={
        **with_biases(
            {slot: name for slot, name in DECODER.items() if slot.endswith("norm")}
            | {
                "layers.{}.mlp.up": "model.layers.{}.mlp.c_fc.weight",
                "layers.{}.mlp.down": "model.layers.{}.mlp.c_proj.weight",
            }
        ),
        **ATTENTION,
        "embedding": DECODER["embedding"],
        "head": DECODER["head"],
    },
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "sliding_window": 8},
)
