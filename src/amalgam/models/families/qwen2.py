"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): Llama with biases on query, key and value; windows in the upper layers."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_attention, read_model
from amalgam.models.layers import Attention, DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def windowed(config: ConfigReader, attention: Attention) -> tuple[Attention, ...]:
    """One attention per layer: `layer_types` decides, else windows from layer `max_window_layers` on."""
    num_layers = config.int("num_hidden_layers")
    if not config.bool("use_sliding_window", default=False):
        return (attention,) * num_layers
    local = replace(attention, window=config.int("sliding_window"))
    types = config.get("layer_types")
    if types is None:
        first = config.int("max_window_layers", default=num_layers, low=0)
        types = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    known = {"full_attention": attention, "sliding_attention": local}
    if not isinstance(types, list) or len(types) != num_layers or not all(kind in known for kind in types):
        config.refuse("layer_types", types, f"{num_layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in types)


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = replace(read_attention(config), has_qkv_bias=True)
    mlp = DenseMlp(config.int("intermediate_size"))
    return read_model(config, "qwen2", tuple(LayerSpec(a, mlp) for a in windowed(config, attention)))


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128},
)
