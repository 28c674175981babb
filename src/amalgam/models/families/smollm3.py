"""SmolLM3 (`SmolLM3ForCausalLM`): Llama without positions in every fourth layer (Yang et al. 2025, "RoPE to NoPE")."""

from __future__ import annotations

from dataclasses import replace

from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.naming import ATTENTION, DECODER, MLP
from amalgam.models.reading.attention import by_layer_type, read_attention, read_window
from amalgam.models.reading.layers import read_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec

THETA = 2e6


def _read_spec(config: ConfigReader) -> ModelSpec:
    attention = read_attention(
        config,
        default_theta=THETA,
        default_kv_heads=4,
        has_bias=config.bool("attention_bias", default=False),
    )
    num_layers, interval = config.int("num_hidden_layers"), config.int("no_rope_layer_interval", default=4)
    turns = config.list(
        "no_rope_layers", of=int, what="0 and 1", default=[int(i % interval > 0) for i in range(1, num_layers + 1)]
    )
    if len(turns) < num_layers or not set(turns) <= {0, 1}:
        config.refuse("no_rope_layers", turns, f"{num_layers} times 1, or 0 for a layer without rotation")
    window = read_window(config)
    is_windowed = window is not None and config.bool("use_sliding_window", default=False)
    types = [f"{'sliding' if is_windowed and not turn else 'full'}_attention" for turn in turns[:num_layers]]
    mlp = DenseMlp(config.int("intermediate_size"), has_bias=config.bool("mlp_bias", default=False))
    layers = tuple(
        LayerSpec(one if turn else replace(one, rope=None), mlp)
        for one, turn in zip(by_layer_type(config, attention, window, types), turns, strict=False)
    )
    return read_model(config, "smollm3", layers, default_tied=True)


FAMILY = Family(
    name="smollm3",
    architectures=("SmolLM3ForCausalLM",),
    read_spec=_read_spec,
    names={**DECODER, **ATTENTION, **MLP},
    tiny_config={"num_key_value_heads": 2, "intermediate_size": 128, "no_rope_layers": [1, 0]},
)
