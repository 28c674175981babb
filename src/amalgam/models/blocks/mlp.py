"""Dense MLPs, and the three projections that they share with experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from amalgam.kernels.packed import PackedWeight
from amalgam.kernels.program import Emitter, Rows, SwiGlu
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class DenseMlp:
    """SwiGLU MLP (Shazeer 2020): `down(silu(gate(x)) × up(x))`."""

    intermediate_size: int
    has_bias: bool = False
    num_experts: int = 0
    num_active_experts: int = 0

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        return gated_slots("", hidden_size, self.intermediate_size, "mlp", has_bias=self.has_bias)

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        return emit_swiglu(step, x, weights, "", "delta")


def emit_swiglu(step: Emitter, x: Rows, weights: BlockWeights, prefix: str, buffer: str) -> Rows:
    """A SwiGLU MLP whose slots start with `prefix`; its result is in `buffer`."""

    def part(name: str, buffer: str) -> tuple[PackedWeight, Tensor | None, str]:
        return weights[f"{prefix}{name}"], weights.vector(f"{prefix}{name}_bias"), buffer

    gate, up = step.project(x, part("gate", "gate"), part("up", "up"))
    joined = step.rows("joined", gate.width)
    step.add(SwiGlu(gate, up, joined))
    (out,) = step.project(joined, part("down", buffer))
    return out


def gated_slots(prefix: str, hidden: int, width: int, role: str, *, has_bias: bool = False) -> Iterator[Slot]:
    """The three projections of a gated MLP and their biases."""
    for name, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        yield Slot(f"{prefix}{name}", shape, role)
        if has_bias:
            yield Slot(f"{prefix}{name}_bias", (shape[0],), "bias")
