"""The contract of a quantizer, and its use with a format."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from amalgam.formats.contract import WritableFormat
from amalgam.formats.grid import Codes, Encoded, Grid, QuantizeOptions


class Quantizer(Protocol):
    """Chooses the codes and scales of a matrix."""

    def __call__(self, weight: Tensor, grid: Grid) -> Codes:
        """
        Args:
            weight: floating, finite, of the grid's shape.
        """


def quantize(
    weight: Tensor, target: WritableFormat, quantizer: Quantizer, options: QuantizeOptions = QuantizeOptions()
) -> Encoded:
    """A matrix in the published layout of a format.

    Raises:
        ConfigError: an option that the format does not take, or that does not fit the shape.
    """
    return target.encode(quantizer(weight, target.grid(tuple(weight.shape), weight.dtype, options)))
