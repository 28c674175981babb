"""Instructions of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from amalgam.kernels.program.rows import Rows
from amalgam.kernels.weights import SWIGLU, ExpertTable, GatedActivation, PackedWeight

Scoring = Literal["softmax", "sigmoid", "chosen", "apart", "mixer"]


@dataclass(frozen=True, eq=False)
class Route:
    """Each token's experts and their weights, in float32, the first choice first. Every token has `k` of them.

    The scores are x Wᵀ + b. By `scoring`,

        softmax  the k largest probabilities over all experts (Shazeer et al. 2017)
        sigmoid  sigmoid scores; `correction` takes part in the choice, not in the weights (DeepSeek-V3)
        chosen   the k largest scores, and a softmax over those alone (gpt-oss)
        apart    the k largest scores, and the sigmoid of each (Llama 4)
        mixer    the best, then the best of the others; each weighted by a softmax over the candidates within a
                 relative distance of `2 × jitter` of it (Liu et al. 2024, "GRIN: GRadient-INformed MoE")

    Attributes:
        num_groups, num_kept: experts are in groups of equal size, of which the best `num_kept` are taken. A group
            counts as its largest score, with `sigmoid` as the sum of its two largest.
        normalises: the weights are divided by their sum + `sum_eps`.
        scaling: multiplies the weights at the end.
        factors: of each expert, `[experts]`, multiply its weights at the end (Gemma 4).
    """

    x: Rows
    weight: PackedWeight
    layer_id: int
    k: int
    scoring: Scoring = "softmax"
    bias: Tensor | None = None
    correction: Tensor | None = None
    num_groups: int = 1
    num_kept: int = 1
    normalises: bool = False
    sum_eps: float = 0.0
    scaling: float = 1.0
    jitter: float = 0.0
    factors: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Mix:
    """out = Σₖ gate weight × expert(x), each expert a gated MLP, with the routing of the last `Route`.

    `weighs`: whether there is a gate weight; see `WeighInput`.
    """

    x: Rows
    experts: ExpertTable
    out: Rows
    activation: GatedActivation = SWIGLU
    weighs: bool = True


@dataclass(frozen=True, eq=False)
class WeighInput:
    """out = x × the gate weight of the token's only expert, by the last `Route` (Llama 4)."""

    x: Rows
    out: Rows
