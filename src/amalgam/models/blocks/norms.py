"""Norms over the hidden size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from amalgam.kernels.program import Emitter, Normalize, Rows
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class RmsNorm:
    """RMSNorm (Zhang & Sennrich 2019).

    Attributes:
        rounds_last: after the multiplication with the weight, not before.
        adds_one: the weight is stored without the 1 that is added to it (Gemma).
    """

    eps: float
    rounds_last: bool = False
    adds_one: bool = False

    def slots(self, name: str, width: int) -> Iterator[Slot]:
        yield Slot(name, (width,), "norm")

    def emit(
        self, step: Emitter, x: Rows, out: Rows, weights: BlockWeights, name: str, delta: Rows | None = None
    ) -> None:
        weight = norm_weight(weights, name, self.adds_one)
        step.add(Normalize(x, weight, out, self.eps, delta=delta, rounds_last=self.rounds_last))


def norm_weight(weights: BlockWeights, name: str, adds_one: bool) -> Tensor:
    """A norm's weight as it multiplies, `[width]`."""
    weight = weights[name].dense
    return 1.0 + weight.float() if adds_one else weight


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
