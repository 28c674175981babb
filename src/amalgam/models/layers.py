"""The blocks that several families share: norms, attention, dense MLP, mixture of experts.

In: activations, one block's weights, a `BlockContext`. Out: activations. Must never know: requests, files, precisions.

Each block is a frozen dataclass of its sizes; `slots` says which weights it needs, calling it runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from amalgam.kernels import ops
from amalgam.kernels.packed import SWIGLU, Activation
from amalgam.models.context import BlockContext
from amalgam.models.rope import Rope
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class RmsNorm:
    """See `ops.rms_norm`."""

    eps: float

    def slots(self, name: str, width: int) -> Iterator[Slot]:
        yield Slot(name, (width,), "norm")

    def __call__(self, x: Tensor, weights: BlockWeights, name: str) -> Tensor:
        return ops.rms_norm(x, weights[name].dense, self.eps)

    def after(self, x: Tensor, delta: Tensor, weights: BlockWeights, name: str) -> tuple[Tensor, Tensor]:
        return ops.add_rms_norm(x, delta, weights[name].dense, self.eps)


@dataclass(frozen=True)
class LayerNorm:
    """See `ops.layer_norm`."""

    eps: float

    def slots(self, name: str, width: int) -> Iterator[Slot]:
        yield Slot(name, (width,), "norm")
        yield Slot(f"{name}_bias", (width,), "bias")

    def __call__(self, x: Tensor, weights: BlockWeights, name: str) -> Tensor:
        return ops.layer_norm(x, weights[name].dense, weights[f"{name}_bias"].dense, self.eps)

    def after(self, x: Tensor, delta: Tensor, weights: BlockWeights, name: str) -> tuple[Tensor, Tensor]:
        return x + delta, self(x + delta, weights, name)


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

    A family whose projections differ overrides `slots` and `project`. A slot `sinks` (one logit per head, see
    `ops.paged_attention`) is used if there is one.

    Attributes:
        rope: None: the model has positions in its embedding.
        norm_eps: of the head norms.
        has_qkv_bias, has_output_bias: whether the projections have biases.
        has_head_norm: RMSNorm over each query and key head before the rotation (Qwen3).
        window: a token sees this many positions, itself included; None: all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    norm_eps: float = 1e-6
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
        step = context.step
        query, key, value = self.project(x, weights)
        attended = ops.cached_attention(
            query,
            key,
            value,
            keys=step.kv.keys[context.layer_id],
            values=step.kv.values[context.layer_id],
            slot_ids=step.slot_ids,
            batch=step.attention,
            norms=(weights["q_norm"].dense, weights["k_norm"].dense) if self.has_head_norm else None,
            norm_eps=self.norm_eps,
            rotary=None if self.rope is None else context.rotary[self.rope],
            scale=self.head_dim**-0.5,
            window=self.window,
            sinks=weights.vector("sinks"),
        )
        return ops.linear(attended, weights["o"], weights.vector("o_bias"))

    def project(self, x: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor, Tensor]:
        """`[tokens, hidden]` → queries `[tokens, num_heads × head_dim]`, keys and values of the kv heads."""
        biases = [weights.vector(f"{name}_bias") for name in ("q", "k", "v")] if self.has_qkv_bias else None
        query, key, value = ops.linears(x, (weights["q"], weights["k"], weights["v"]), biases)
        return query, key, value


@dataclass(frozen=True)
class DenseMlp:
    """SwiGLU MLP (Shazeer 2020): `down(silu(gate(x)) × up(x))`."""

    intermediate_size: int
    has_bias: bool = False
    num_experts: int = 0
    num_active_experts: int = 0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        return _gated_slots("", hidden_size, self.intermediate_size, "mlp", has_bias=self.has_bias)

    def __call__(self, x: Tensor, weights: BlockWeights, context: BlockContext) -> Tensor:
        return _swiglu_mlp(x, weights, "")


class Router(Protocol):
    """Chooses each token's experts: a frozen dataclass of its sizes. Works in float32 throughout, since which expert
    a token goes to must not hang on a rounding."""

    @property
    def num_experts(self) -> int: ...

    @property
    def num_active_experts(self) -> int: ...

    def slots(self, hidden_size: int) -> Iterator[Slot]: ...

    def __call__(self, x: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor]:
        """Expert ids int64 and gate weights float32, both `[tokens, k]`, the router's first choice first."""


@dataclass(frozen=True)
class SoftmaxRouter:
    """Probabilities over all experts, the top k kept (Shazeer et al. 2017; Fedus et al. 2022).

    `normalises` divides them by their sum, to which `sum_eps` is added.
    """

    num_experts: int
    num_active_experts: int
    normalises: bool
    sum_eps: float = 0.0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield Slot("router", (self.num_experts, hidden_size), "router")

    def __call__(self, x: Tensor, weights: BlockWeights) -> tuple[Tensor, Tensor]:
        router, k = weights["router"], self.num_active_experts
        return ops.route(x, router, k, normalises=self.normalises, sum_eps=self.sum_eps)


@dataclass(frozen=True)
class SparseMoe:
    """Mixture of gated experts, perhaps beside shared ones that every token passes.

    Attributes:
        shared_size: width of the shared experts, which are one SwiGLU MLP; 0: none.
        has_shared_gate: the shared experts' output is multiplied by a sigmoid of a projection of x (Qwen2-MoE).
    """

    router: Router
    intermediate_size: int
    activation: Activation = SWIGLU
    has_bias: bool = False
    shared_size: int = 0
    has_shared_gate: bool = False

    @property
    def num_experts(self) -> int:
        return self.router.num_experts

    @property
    def num_active_experts(self) -> int:
        return self.router.num_active_experts

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield from self.router.slots(hidden_size)
        for expert_id in range(self.num_experts):
            prefix = f"experts.{expert_id}."
            yield from _gated_slots(prefix, hidden_size, self.intermediate_size, "expert", has_bias=self.has_bias)
        if self.shared_size:
            yield from _gated_slots("shared.", hidden_size, self.shared_size, "shared_expert")
        if self.has_shared_gate:
            yield Slot("shared_gate", (1, hidden_size), "router")

    def __call__(self, x: Tensor, weights: BlockWeights, context: BlockContext) -> Tensor:
        expert_ids, gate_weights = self.router(x, weights)
        if context.step.observer is not None:
            context.step.observer.observe(context.layer_id, expert_ids, gate_weights)
        routed = ops.moe(x, expert_ids, gate_weights, weights.experts, self.activation)
        if not self.shared_size:
            return routed
        shared = _swiglu_mlp(x, weights, "shared.")
        if self.has_shared_gate:
            shared = (ops.sigmoid(ops.linear(x.float(), weights["shared_gate"])) * shared.float()).to(x.dtype)
        return routed + shared


def _swiglu_mlp(x: Tensor, weights: BlockWeights, prefix: str) -> Tensor:
    names = (f"{prefix}gate", f"{prefix}up")
    biases = [weights.vector(f"{name}_bias") for name in names]
    gate, up = ops.linears(x, [weights[name] for name in names], biases)
    return ops.linear(ops.swiglu(gate, up), weights[f"{prefix}down"], weights.vector(f"{prefix}down_bias"))


def _gated_slots(prefix: str, hidden: int, width: int, role: str, *, has_bias: bool = False) -> Iterator[Slot]:
    """The three projections of a gated MLP and their biases."""
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Slot(f"{prefix}{name}", shape, role)
        if has_bias:
            yield Slot(f"{prefix}{name}_bias", (shape[0],), "bias")
