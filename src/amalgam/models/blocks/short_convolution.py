"""Gated short convolution: a few rows of each sequence instead of keys and values (Liquid AI 2025, "LFM2 Technical
Report")."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from amalgam.kernels.program import Convolve, Emitter, Rows
from amalgam.models.blocks.recurrent import RecurrentBlock
from amalgam.models.spec import Slot, StateShape
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class ShortConvolution(RecurrentBlock):
    """out(C × convolution(B × x)), where one projection gives B, C and x.

    Attributes:
        width: of B, C and x each.
        kernel_size: rows that the convolution sees, the newest included.
        has_bias: of the projections and of the convolution.
    """

    width: int
    kernel_size: int
    has_bias: bool = False
    layer_type: ClassVar[str] = "conv"

    @property
    def state_shape(self) -> StateShape:
        return StateShape((self.kernel_size - 1, self.width), (0, 0, 0))

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        parts = (
            Slot("bcx", (3 * self.width, hidden_size), "linear_attention"),
            Slot("convolution", (self.width, 1, self.kernel_size), "convolution"),
            Slot("out", (hidden_size, self.width), "linear_attention"),
        )
        for slot in parts:
            yield slot
            if self.has_bias:
                yield Slot(f"{slot.name}_bias", slot.shape[:1], "bias")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        (together,) = step.project(x, (weights["bcx"], weights.vector("bcx_bias"), "mixed"))
        before, behind, mixed = (together.columns(part * self.width, self.width) for part in range(3))
        seen = step.rows("convolved", self.width)
        step.add(
            Convolve(
                mixed,
                weights["convolution"].dense.flatten(1),
                seen,
                step.layer_id,
                bias=weights.vector("convolution_bias"),
                before=before,
                behind=behind,
                activates=False,
            )
        )
        (delta,) = step.project(seen, (weights["out"], weights.vector("out_bias"), "delta"))
        return delta
