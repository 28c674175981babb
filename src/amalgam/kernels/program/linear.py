"""Instructions that read weights row by row: embeddings, norms, products."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from amalgam.kernels.program.rows import Rows
from amalgam.kernels.weights import PackedWeight


@dataclass(frozen=True, eq=False)
class Embed:
    """out = the weight's rows of the tokens' ids or positions; or out += those."""

    weight: PackedWeight
    out: Rows
    by_position: bool = False
    adds: bool = False


@dataclass(frozen=True, eq=False)
class Normalize:
    """out = norm(x); with a `delta`, x += delta before.

    RMSNorm (Zhang & Sennrich 2019), or with a `bias` LayerNorm (Ba et al. 2016), over every `len(weight)` columns.
    RMSNorm is rounded to the activations' type before the multiplication with the weight, or with `rounds_last` after
    it. `x` and `out` may be the same.
    """

    x: Rows
    weight: Tensor
    out: Rows
    eps: float
    bias: Tensor | None = None
    delta: Rows | None = None
    rounds_last: bool = False


@dataclass(frozen=True, eq=False)
class Projection:
    """out = x Wᵀ + b."""

    weight: PackedWeight
    bias: Tensor | None
    out: Rows


@dataclass(frozen=True, eq=False)
class Project:
    """The same rows times several weights. `widens`: x is taken as float32, and no weight is rounded."""

    x: Rows
    projections: tuple[Projection, ...]
    widens: bool = False


@dataclass(frozen=True, eq=False)
class Head:
    """The step's result: float32 logits `[rows, vocabulary]` of the rows that are wanted.

    They are multiplied by `scale`; with a `softcap` they then become `softcap × tanh(logit / softcap)`.
    """

    x: Rows
    weight: PackedWeight
    bias: Tensor | None
    scale: float = 1.0
    softcap: float | None = None
