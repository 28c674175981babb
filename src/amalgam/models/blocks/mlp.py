"""Dense MLPs, and the three projections that they share with experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from amalgam.kernels.program import Emitter, Gelu, Rows, SwiGlu
from amalgam.kernels.weights import SWIGLU, GatedActivation, PackedWeight
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class DenseMlp:
    """Gated MLP (Shazeer 2020): `down(silu(gate(x)) × up(x))`, or with another activation.

    `is_fused`: one projection gives gate and up, side by side (Phi-3).
    """

    intermediate_size: int
    has_bias: bool = False
    activation: GatedActivation = SWIGLU
    is_fused: bool = False
    num_experts: int = 0
    num_active_experts: int = 0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        size = self.intermediate_size
        if not self.is_fused:
            return gated_slots("", hidden_size, size, "mlp", has_bias=self.has_bias)
        return plain_slots("gate_up", hidden_size, 2 * size, "mlp", has_bias=self.has_bias, inner=size)

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        return emit_gated(step, x, weights, "", "delta", self.activation)


@dataclass(frozen=True)
class GeluMlp:
    """`down(gelu(up(x)))` with the tanh approximation (Hendrycks & Gimpel 2016)."""

    intermediate_size: int
    has_bias: bool = True
    num_experts: int = 0
    num_active_experts: int = 0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        return plain_slots("up", hidden_size, self.intermediate_size, "mlp", has_bias=self.has_bias)

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        (up,) = step.project(x, (weights["up"], weights.vector("up_bias"), "up"))
        step.add(Gelu(up))
        (delta,) = step.project(up, (weights["down"], weights.vector("down_bias"), "delta"))
        return delta


def emit_gated(
    step: Emitter, x: Rows, weights: BlockWeights, prefix: str, buffer: str, activation: GatedActivation = SWIGLU
) -> Rows:
    """A gated MLP whose slots start with `prefix`; its result is in `buffer`."""

    def part(name: str, buffer: str) -> tuple[PackedWeight, Tensor | None, str]:
        return weights[f"{prefix}{name}"], weights.vector(f"{prefix}{name}_bias"), buffer

    if f"{prefix}gate_up" in weights:
        (together,) = step.project(x, part("gate_up", "gate_up"))
        width = together.width // 2
        gate, up = together.columns(0, width), together.columns(width, width)
    else:
        gate, up = step.project(x, part("gate", "gate"), part("up", "up"))
    joined = step.rows("joined", gate.width)
    step.add(SwiGlu(gate, up, joined, activation))
    (out,) = step.project(joined, part("down", buffer))
    return out


def plain_slots(
    first: str, hidden: int, width: int, role: str, *, has_bias: bool, inner: int | None = None
) -> Iterator[Slot]:
    """Two projections and their biases: `first` to `width` columns, and `down` from `inner`; None: as many."""
    for name, shape in ((first, (width, hidden)), ("down", (hidden, inner or width))):
        yield Slot(name, shape, role)
        if has_bias:
            yield Slot(f"{name}_bias", (shape[0],), "bias")


def gated_slots(prefix: str, hidden: int, width: int, role: str, *, has_bias: bool = False) -> Iterator[Slot]:
    """The three projections of a gated MLP and their biases."""
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Slot(f"{prefix}{name}", shape, role)
        if has_bias:
            yield Slot(f"{prefix}{name}_bias", (shape[0],), "bias")
