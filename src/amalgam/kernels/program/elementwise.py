"""Instructions on every element of rows by itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from amalgam.kernels.program.rows import Rows
from amalgam.kernels.weights import SWIGLU, GatedActivation


@dataclass(frozen=True, eq=False)
class Add:
    """x += y."""

    x: Rows
    y: Rows


@dataclass(frozen=True, eq=False)
class Scale:
    """x ×= factor; with `rounds_factor` the factor is rounded to the activations' type before."""

    x: Rows
    factor: float
    rounds_factor: bool = False


@dataclass(frozen=True, eq=False)
class ScaleByPosition:
    """x ×= 1 + beta × ln(1 + ⌊(position + offset) / length⌋): attention that stays sharp in long contexts.

    Nakanishi 2025, "Scalable-Softmax Is Superior for Attention"; the logarithm with its steps is Llama 4's.
    """

    x: Rows
    beta: float
    length: int
    offset: int = 0


@dataclass(frozen=True, eq=False)
class ScaleBySigmoid:
    """x ×= sigmoid(gate): one factor for each of as many equal parts of a row as the gate has columns."""

    x: Rows
    gate: Rows


@dataclass(frozen=True, eq=False)
class ScaleHeads:
    """x ×= slope × ln(position + 1) + bias, with a slope and a bias for each of the equal parts of a row.

    Nakanishi 2025, "Scalable-Softmax Is Superior for Attention".

    Attributes:
        slopes, biases: `[heads]`.
    """

    x: Rows
    slopes: Tensor
    biases: Tensor


@dataclass(frozen=True, eq=False)
class Clamp:
    """x is kept within ±limit."""

    x: Rows
    limit: float


@dataclass(frozen=True, eq=False)
class Gelu:
    """x = gelu(x) with the tanh approximation (Hendrycks & Gimpel 2016)."""

    x: Rows


@dataclass(frozen=True, eq=False)
class SwiGlu:
    """out = silu(gate) × up (Shazeer 2020), or as another `GatedActivation` says."""

    gate: Rows
    up: Rows
    out: Rows
    activation: GatedActivation = SWIGLU


@dataclass(frozen=True, eq=False)
class Split:
    """Columns in equal groups become buffers of one part each: all queries, all keys, …

        x         group 0: part 0, part 1, …  |  group 1: part 0, part 1, …  |  …
        outs[i]   part i of group 0, part i of group 1, …

    Attributes:
        outs: none of them in x's buffer. A part is as wide as its `out` divided by `num_groups`; together they are as
            wide as x.
    """

    x: Rows
    num_groups: int
    outs: tuple[Rows, ...]
