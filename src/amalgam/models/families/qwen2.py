"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): Llama with biases on query, key and value; windows in the upper layers."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.families.llama import read_attention, read_model
from amalgam.models.families.mistral import read_window
from amalgam.models.layers import Attention, DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

WINDOW = 4096  # the configuration class's defaults, where a key is missing
FIRST_WINDOW = 28


def by_layer_type(
    config: ConfigReader, attention: Attention, window: int | None, default_types: list[str]
) -> tuple[Attention, ...]:
    """One attention per layer, as `layer_types` says: full, or with a window if there is one."""
    types = config.get("layer_types", default=default_types)
    known = {"full_attention": attention}
    if window is not None:
        known["sliding_attention"] = replace(attention, window=window)
    if not isinstance(types, list) or len(types) != len(default_types) or not all(kind in known for kind in types):
        config.refuse("layer_types", types, f"{len(default_types)} of {', '.join(known)}")
    return tuple(known[kind] for kind in types)


def read_used_window(config: ConfigReader) -> int | None:
    """`sliding_window` if `use_sliding_window` says so; null means none."""
    return read_window(config, default=WINDOW) if config.bool("use_sliding_window", default=False) else None


def windowed(config: ConfigReader, attention: Attention) -> tuple[Attention, ...]:
    """One attention per layer: `layer_types` decides, else windows from layer `max_window_layers` on."""
    window = read_used_window(config)
    num_layers, first = config.int("num_hidden_layers"), config.int("max_window_layers", default=FIRST_WINDOW, low=0)
    types = ["full_attention" if window is None or i < first else "sliding_attention" for i in range(num_layers)]
    return by_layer_type(config, attention, window, types)


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = replace(read_attention(config, default_kv_heads=32), has_qkv_bias=True)
    mlp = DenseMlp(config.int("intermediate_size"))
    return read_model(config, "qwen2", tuple(LayerSpec(a, mlp) for a in windowed(config, attention)))


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128},
)
