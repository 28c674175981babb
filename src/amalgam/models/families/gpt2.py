"""GPT-2 (`GPT2LMHeadModel`): learned positions, LayerNorm, one fused projection to query, key and value, GELU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from amalgam.models.blocks.attention import FusedAttention
from amalgam.models.blocks.mlp import GeluMlp
from amalgam.models.blocks.norms import LayerNorm
from amalgam.models.naming import with_biases
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec, Slot


def _transposed(slots: Iterator[Slot]) -> Iterator[Slot]:
    """The checkpoint's `Conv1D` stores weights as `(in, out)`."""
    return (replace(slot, is_transposed=len(slot.shape) == 2) for slot in slots)


class Conv1DAttention(FusedAttention):
    def slots(self, hidden_size: int) -> Iterator[Slot]:
        return _transposed(super().slots(hidden_size))


class Conv1DMlp(GeluMlp):
    def slots(self, hidden_size: int) -> Iterator[Slot]:
        return _transposed(super().slots(hidden_size))


def _read_spec(config: ConfigReader) -> ModelSpec:
    config.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    config.expect("scale_attn_weights", True)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config.expect("add_cross_attention", False)
    hidden, heads = config.int("n_embd", "hidden_size"), config.int("n_head", "num_attention_heads")
    if hidden % heads:
        config.refuse("n_head", heads, f"a divisor of n_embd {hidden}")
    attention = Conv1DAttention(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        rope=None,
        has_qkv_bias=True,
        has_output_bias=True,
    )
    mlp = Conv1DMlp(config.int("n_inner", default=4 * hidden))
    return ModelSpec(
        family="gpt2",
        hidden_size=hidden,
        vocab_size=config.int("vocab_size"),
        max_positions=config.int("n_positions", "max_position_embeddings"),
        norm=LayerNorm(config.float("layer_norm_epsilon", default=1e-5, low=0)),
        has_tied_head=config.bool("tie_word_embeddings", default=True),
        layers=(LayerSpec(attention, mlp),) * config.int("n_layer", "num_hidden_layers"),
        has_position_embedding=True,
    )


_LAYER = "transformer.h.{}"

FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    read_spec=_read_spec,
    names={
        "embedding": "transformer.wte.weight",
        "positions": "transformer.wpe.weight",
        "head": "lm_head.weight",
        **with_biases(
            {
                "norm": "transformer.ln_f.weight",
                "layers.{}.attention_norm": f"{_LAYER}.ln_1.weight",
                "layers.{}.attention.qkv": f"{_LAYER}.attn.c_attn.weight",
                "layers.{}.attention.o": f"{_LAYER}.attn.c_proj.weight",
                "layers.{}.mlp_norm": f"{_LAYER}.ln_2.weight",
                "layers.{}.mlp.up": f"{_LAYER}.mlp.c_fc.weight",
                "layers.{}.mlp.down": f"{_LAYER}.mlp.c_proj.weight",
            }
        ),
    },
    # The causal mask, which old checkpoints store.
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
    short_prefixes={"": "transformer."},
)
