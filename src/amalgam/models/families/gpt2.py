"""GPT-2 (`GPT2LMHeadModel`): learned positions, LayerNorm, one fused projection to query, key and value, GELU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from amalgam.kernels.program import Emitter, Gelu, Rows
from amalgam.models.blocks.attention import Attention
from amalgam.models.blocks.norms import LayerNorm
from amalgam.models.naming import with_biases
from amalgam.models.spec import ConfigReader, Family, LayerSpec, ModelSpec, Slot
from amalgam.models.weights import BlockWeights


def _conv1d_slots(name: str, shape: tuple[int, int], role: str) -> Iterator[Slot]:
    """A projection with a bias; the checkpoint's `Conv1D` stores the weight as `(in, out)`."""
    yield Slot(name, shape, role, is_transposed=True)
    yield Slot(f"{name}_bias", shape[:1], "bias")


@dataclass(frozen=True)
class FusedAttention(Attention):
    """The thirds of one projection are query, key and value."""

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield from _conv1d_slots("qkv", (3 * hidden_size, hidden_size), "attention")
        yield from _conv1d_slots("o", (hidden_size, hidden_size), "attention")

    def project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows]:
        (together,) = step.project(x, (weights["qkv"], weights.vector("qkv_bias"), "query_key_value"))
        width = together.width // 3
        return together.columns(0, width), together.columns(width, width), together.columns(2 * width, width)


@dataclass(frozen=True)
class GeluMlp:
    """`down(gelu(up(x)))` with the tanh approximation (Hendrycks & Gimpel 2016)."""

    intermediate_size: int
    num_experts: int = 0
    num_active_experts: int = 0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield from _conv1d_slots("up", (self.intermediate_size, hidden_size), "mlp")
        yield from _conv1d_slots("down", (hidden_size, self.intermediate_size), "mlp")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        (up,) = step.project(x, (weights["up"], weights.vector("up_bias"), "up"))
        step.add(Gelu(up))
        (delta,) = step.project(up, (weights["down"], weights.vector("down_bias"), "delta"))
        return delta


def _read_spec(config: ConfigReader) -> ModelSpec:
    config.expect("activation_function", "gelu_new", "gelu_pytorch_tanh")
    config.expect("scale_attn_weights", True)
    config.expect("scale_attn_by_inverse_layer_idx", False)
    config.expect("add_cross_attention", False)
    hidden, heads = config.int("n_embd", "hidden_size"), config.int("n_head", "num_attention_heads")
    if hidden % heads:
        config.refuse("n_head", heads, f"a divisor of n_embd {hidden}")
    attention = FusedAttention(num_heads=heads, num_kv_heads=heads, head_dim=hidden // heads, rope=None)
    mlp = GeluMlp(config.int("n_inner", default=4 * hidden))
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
    optional_prefix="transformer.",
)
