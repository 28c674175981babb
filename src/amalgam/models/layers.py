"""The blocks that most families share: attention, dense MLP, mixture of experts.

In: activations, one block's weights, a `BlockContext`. Out: activations. Must never know: requests, files, precisions.

Each block is a frozen dataclass of its sizes; `slots` says which weights it needs, calling it runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.kernels import ops
from amalgam.models.context import BlockContext
from amalgam.models.rope import Rope
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

    Attributes:
        has_qkv_bias, has_output_bias: whether the projections have biases.
        has_head_norm: RMSNorm over each query and key head before the rotation (Qwen3).
        window: a token sees this many positions, itself included; None: all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    norm_eps: float
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_head_norm: bool = False
    window: int | None = None

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return self.num_kv_heads, self.head_dim, self.head_dim

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        widths = {"q": self.num_heads * self.head_dim, "k": self.num_kv_heads * self.head_dim}
        widths["v"] = widths["k"]
        for name, width in widths.items():
            yield Slot(name, (width, hidden_size), "attention")
            if self.has_qkv_bias:
                yield Slot(f"{name}_bias", (width,), "bias")
        yield Slot("o", (hidden_size, widths["q"]), "attention")
        if self.has_output_bias:
            yield Slot("o_bias", (hidden_size,), "bias")
        if self.has_head_norm:
            yield Slot("q_norm", (self.head_dim,), "norm")
            yield Slot("k_norm", (self.head_dim,), "norm")

    def __call__(self, x: Tensor, weights: BlockWeights, context: BlockContext) -> Tensor:
        tokens = x.shape[0]
        query = ops.linear(x, weights["q"], weights.vector("q_bias")).view(tokens, self.num_heads, -1)
        key = ops.linear(x, weights["k"], weights.vector("k_bias")).view(tokens, self.num_kv_heads, -1)
        value = ops.linear(x, weights["v"], weights.vector("v_bias")).view(tokens, self.num_kv_heads, -1)
        if self.has_head_norm:
            query = ops.rms_norm(query, weights["q_norm"].dense, self.norm_eps)
            key = ops.rms_norm(key, weights["k_norm"].dense, self.norm_eps)
        cos, sin = context.rotary[self.rope]
        query, key = ops.rotate(query, cos, sin), ops.rotate(key, cos, sin)

        step = context.step
        keys, values = step.kv.keys[context.layer_id], step.kv.values[context.layer_id]
        ops.write_kv(keys, values, key, value, step.slot_ids)
        attended = ops.paged_attention(
            query, keys, values, step.attention, scale=self.head_dim**-0.5, window=self.window
        )
        return ops.linear(attended.flatten(1), weights["o"], weights.vector("o_bias"))


@dataclass(frozen=True)
class DenseMlp:
    """SwiGLU MLP (Shazeer 2020): `down(silu(gate(x)) × up(x))`."""

    intermediate_size: int
    has_bias: bool = False
    num_experts: int = 0
    num_active_experts: int = 0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        return _swiglu_slots("", hidden_size, self.intermediate_size, "mlp", has_bias=self.has_bias)

    def __call__(self, x: Tensor, weights: BlockWeights, context: BlockContext) -> Tensor:
        gate = ops.linear(x, weights["gate"], weights.vector("gate_bias"))
        up = ops.linear(x, weights["up"], weights.vector("up_bias"))
        return ops.linear(ops.swiglu(gate, up), weights["down"], weights.vector("down_bias"))


@dataclass(frozen=True)
class SparseMoe:
    """Mixture of SwiGLU experts with a softmax router (Shazeer et al. 2017; Fedus et al. 2022).

    Probabilities over all experts, the top k kept; `normalises` divides them by their sum.
    The router always works in float32: which expert a token goes to must not hang on a rounding.
    """

    num_experts: int
    num_active_experts: int
    intermediate_size: int
    normalises: bool

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")
        for expert_id in range(self.num_experts):
            yield from _swiglu_slots(f"experts.{expert_id}.", hidden_size, self.intermediate_size, "expert")

    def __call__(self, x: Tensor, weights: BlockWeights, context: BlockContext) -> Tensor:
        expert_ids, gate_weights = self.route(x, weights)
        if context.step.observer is not None:
            context.step.observer.observe(context.layer_id, expert_ids, gate_weights)
        return ops.moe(x, expert_ids, gate_weights, weights.experts)

    def route(self, x: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor]:
        """Expert ids int64 and gate weights float32, both `[tokens, k]`, the heaviest first."""
        probabilities = torch.softmax(ops.linear(x.float(), weights["router"]), dim=-1)
        gate_weights, expert_ids = torch.topk(probabilities, self.num_active_experts, dim=-1)
        if self.normalises:
            gate_weights = gate_weights / gate_weights.sum(-1, keepdim=True)
        return expert_ids, gate_weights


def _swiglu_slots(prefix: str, hidden: int, width: int, role: str, *, has_bias: bool = False) -> Iterator[Slot]:
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Slot(f"{prefix}{name}", shape, role)
        if has_bias:
            yield Slot(f"{prefix}{name}_bias", (shape[0],), "bias")
