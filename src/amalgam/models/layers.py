"""The blocks that several families share: norms, attention, dense MLP, mixture of experts.

In: one block's weights. Out: instructions. Must never know: requests, files, precisions, how instructions are run.

Each block is a frozen dataclass of its sizes; `slots` says which weights it needs, `emit` what is computed with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from amalgam.kernels.packed import SWIGLU, Activation, PackedWeight
from amalgam.kernels.program import (
    Add,
    Attend,
    Emitter,
    Mix,
    Normalize,
    Project,
    Projection,
    Route,
    Rows,
    ScaleBySigmoid,
    SwiGlu,
)
from amalgam.models.rope import Rope
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class RmsNorm:
    """RMSNorm (Zhang & Sennrich 2019); `rounds_last`: after the multiplication with the weight, not before."""

    eps: float
    rounds_last: bool = False

    def slots(self, name: str, width: int) -> Iterator[Slot]:
        yield Slot(name, (width,), "norm")

    def emit(
        self, step: Emitter, x: Rows, out: Rows, weights: BlockWeights, name: str, delta: Rows | None = None
    ) -> None:
        weight = weights[name].dense
        step.add(Normalize(x, weight, out, self.eps, delta=delta, rounds_last=self.rounds_last))


@dataclass(frozen=True)
class LayerNorm:
    """LayerNorm (Ba et al. 2016)."""

    eps: float

    def slots(self, name: str, width: int) -> Iterator[Slot]:
        yield Slot(name, (width,), "norm")
        yield Slot(f"{name}_bias", (width,), "bias")

    def emit(
        self, step: Emitter, x: Rows, out: Rows, weights: BlockWeights, name: str, delta: Rows | None = None
    ) -> None:
        weight, bias = weights[name].dense, weights[f"{name}_bias"].dense
        step.add(Normalize(x, weight, out, self.eps, bias=bias, delta=delta))


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

    A family whose projections differ overrides `slots` and `project`. A slot `sinks` (one logit per head that takes
    part in the softmax without a value) is used if there is one.

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

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        query, key, value = self.project(step, x, weights)
        attended = step.rows("attended", self.num_heads * self.head_dim)
        step.add(
            Attend(
                query,
                key,
                value,
                attended,
                layer_id=step.layer_id,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                scale=self.head_dim**-0.5,
                head_norms=(weights["q_norm"].dense, weights["k_norm"].dense) if self.has_head_norm else None,
                head_norm_eps=self.norm_eps,
                rope=step.rope(self.rope),
                window=self.window,
                sinks=weights.vector("sinks"),
            )
        )
        (delta,) = step.project(attended, (weights["o"], weights.vector("o_bias"), "delta"))
        return delta

    def project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows]:
        """Where the queries, `num_heads × head_dim` columns, and the keys and values of the kv heads will be."""
        names = ("q", "query"), ("k", "key"), ("v", "value")
        query, key, value = step.project(
            x, *((weights[name], weights.vector(f"{name}_bias"), buffer) for name, buffer in names)
        )
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

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        return _emit_swiglu_mlp(step, x, weights, "", "delta")


class Router(Protocol):
    """Chooses each token's experts: a frozen dataclass of its sizes. Works in float32 throughout, since which expert
    a token goes to must not hang on a rounding."""

    @property
    def num_experts(self) -> int: ...

    @property
    def num_active_experts(self) -> int: ...

    def slots(self, hidden_size: int) -> Iterator[Slot]: ...

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        """The instruction that does it."""


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

    def route(self, x: Rows, weights: BlockWeights, layer_id: int) -> Route:
        router, k = weights["router"], self.num_active_experts
        return Route(x, router, layer_id, k, normalises=self.normalises, sum_eps=self.sum_eps)


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

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        delta = step.rows("delta", x.width)
        step.add(self.router.route(x, weights, step.layer_id), Mix(x, weights.experts, delta, self.activation))
        if self.shared_size:
            shared = _emit_swiglu_mlp(step, x, weights, "shared.", "shared")
            if self.has_shared_gate:
                gate = step.rows("shared_gate", 1, is_wide=True)
                step.add(Project(x, (Projection(weights["shared_gate"], None, gate),), widens=True))
                step.add(ScaleBySigmoid(shared, gate))
            step.add(Add(delta, shared))
        return delta


def _emit_swiglu_mlp(step: Emitter, x: Rows, weights: BlockWeights, prefix: str, buffer: str) -> Rows:
    def part(name: str, buffer: str) -> tuple[PackedWeight, Tensor | None, str]:
        return weights[f"{prefix}{name}"], weights.vector(f"{prefix}{name}_bias"), buffer

    gate, up = step.project(x, part("gate", "gate"), part("up", "up"))
    joined = step.rows("joined", gate.width)
    step.add(SwiGlu(gate, up, joined))
    (out,) = step.project(joined, part("down", buffer))
    return out


def _gated_slots(prefix: str, hidden: int, width: int, role: str, *, has_bias: bool = False) -> Iterator[Slot]:
    """The three projections of a gated MLP and their biases."""
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Slot(f"{prefix}{name}", shape, role)
        if has_bias:
            yield Slot(f"{prefix}{name}_bias", (shape[0],), "bias")
