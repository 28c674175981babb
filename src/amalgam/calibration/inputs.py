"""The inputs of a few projections, and what quantizers and measurements ask of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from amalgam.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class Inputs:
    """What projections that read the same rows are given.

    Attributes:
        slots: the projections' slots: `("layers.0.attention.q", "layers.0.attention.k", "layers.0.attention.v")`.
        chunks: float32 `[tokens, in]` each; together all tokens that the projections see.
        num_routed: of an expert, how many tokens the router has sent; None: all tokens pass.
    """

    slots: tuple[str, ...]
    chunks: Sequence[Tensor]
    num_routed: int | None = None

    @property
    def num_tokens(self) -> int:
        """All of them; more than `num_routed` where a rare expert was given others' tokens."""
        return sum(len(chunk) for chunk in self.chunks)

    @cached_property
    def second_moment(self) -> Tensor:
        """The mean of x xᵀ over the tokens, float32 `[in, in]`; half the Hessian of the mean squared output error.

        Raises:
            CheckpointError: an input is NaN or infinite.
        """
        total = sum((chunk.T @ chunk for chunk in self.chunks), start=torch.zeros(()))
        return self._finite(total / max(1, self.num_tokens))

    @cached_property
    def mean_square(self) -> Tensor:
        """The mean of x² over the tokens, float32 `[in]`; the diagonal of `second_moment`.

        Raises:
            CheckpointError: an input is NaN or infinite.
        """
        total = sum((chunk.square().sum(0) for chunk in self.chunks), start=torch.zeros(()))
        return self._finite(total / max(1, self.num_tokens))

    @cached_property
    def mean_magnitude(self) -> Tensor:
        """The mean of |x| over the tokens, float32 `[in]`.

        Raises:
            CheckpointError: an input is NaN or infinite.
        """
        total = sum((chunk.abs().sum(0) for chunk in self.chunks), start=torch.zeros(()))
        return self._finite(total / max(1, self.num_tokens))

    @cached_property
    def largest(self) -> float:
        """The largest magnitude of an input; 0 without tokens.

        Raises:
            CheckpointError: an input is NaN or infinite.
        """
        found = [chunk.abs().amax() for chunk in self.chunks if chunk.numel()]
        return float(self._finite(torch.stack(found).amax())) if found else 0.0

    def _finite(self, value: Tensor) -> Tensor:
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"The inputs of {self.slots[0]!r} hold NaN or infinity.",
                remedy="The model's weights are damaged, or a text leads it out of range: try other texts.",
            )
        return value
