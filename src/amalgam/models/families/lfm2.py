"""LFM2 and LFM2.5, dense (`Lfm2ForCausalLM`): short gated convolutions beside attention."""

from __future__ import annotations

from amalgam.base.fields import MAX_INTEGER
from amalgam.models.blocks.mlp import DenseMlp
from amalgam.models.reading.lfm2 import LFM2, read_lfm2_attention, read_lfm2_model
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec


def _read_intermediate_size(config: ConfigReader) -> int:
    """The first releases say what the size is made of: two thirds, times a factor, up to the next multiple."""
    key = config.present("block_ff_dim", "intermediate_size")
    size: int = config.int(key, default=12288)
    if not config.bool("block_auto_adjust_ff_dim", default=True):
        return size
    multiple: int = config.int("block_multiple_of", default=256)
    factor: float = config.float("block_ffn_dim_multiplier", default=1.0, low=0)
    adjusted = factor * int(2 * size / 3)
    if not 1 <= adjusted <= MAX_INTEGER:
        config.refuse("block_ffn_dim_multiplier", factor, f"a number that makes a size of {key} {size}")
    return -(-int(adjusted) // multiple) * multiple


def _default_types(config: ConfigReader) -> list[str]:
    num_layers = config.int("num_hidden_layers")
    indices = config.list("full_attn_idxs", of=int, what="layer numbers", default=list(range(num_layers)))
    full = set(indices)
    return ["full_attention" if layer in full else "conv" for layer in range(num_layers)]


def _read_spec(config: ConfigReader) -> ModelSpec:
    mlp = DenseMlp(_read_intermediate_size(config))
    attentions = read_lfm2_attention(config, _default_types(config))
    return read_lfm2_model(config, "lfm2", tuple(LayerSpec(attention, mlp) for attention in attentions))


FAMILY = Family(
    name="lfm2",
    architectures=("Lfm2ForCausalLM",),
    read_spec=_read_spec,
    names=LFM2,
    tiny_config={
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_key_value_heads": 2,
        "intermediate_size": 150,
        "block_multiple_of": 32,
    },
)
