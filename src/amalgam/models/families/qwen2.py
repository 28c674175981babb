"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): Llama with biases on query, key and value; windows in the upper layers."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_attention, read_model
from amalgam.models.layers import Attention, DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def by_layer_type(
    config: ConfigReader, attention: Attention, window: int, default_types: list[str]
) -> tuple[Attention, ...]:
    """One attention per layer, as `layer_types` says: full, or with a window."""
    types = config.get("layer_types", default=default_types)
    known = {"full_attention": attention, "sliding_attention": replace(attention, window=window)}
    if not isinstance(types, list) or len(types) != len(default_types) or not all(kind in known for kind in types):
        config.refuse("layer_types", types, f"{len(default_types)} of {', '.join(known)}")
    return tuple(known[kind] for kind in types)


def windowed(config: ConfigReader, attention: Attention) -> tuple[Attention, ...]:
    """One attention per layer: `layer_types` decides, else windows from layer `max_window_layers` on."""
    num_layers = config.int("num_hidden_layers")
    if not config.bool("use_sliding_window", default=False):
        return (attention,) * num_layers
    first = config.int("max_window_layers", default=num_layers, low=0)
    types = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    return by_layer_type(config, attention, config.int("sliding_window"), types)


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
