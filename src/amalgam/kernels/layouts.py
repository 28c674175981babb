"""What the bits of the less common runtime layouts mean; every function here is the layout's definition.

In: a packed weight. Out: its values in float32. Must never know: checkpoint names, plans, requests.
The layouts are drawn in `amalgam.kernels.packed`; dense, scaled8 and int4 stand in `amalgam.kernels.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.kernels.packed import PackedWeight, Unpack
from amalgam.kernels.reference import unpack_dense, unpack_nibbles

# OCP E2M1: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dense(tensor: Tensor) -> PackedWeight:
    """A floating tensor of any shape as a packed weight."""
    return PackedWeight("dense", tuple(tensor.shape), {"weight": tensor}, unpack_dense)


def unpack_affine4(weight: PackedWeight) -> Tensor:
    """`(nibble - zero) × scale` with a floating zero."""
    return _affine(unpack_nibbles(weight.parts["weight"]), weight)


def unpack_affine8(weight: PackedWeight) -> Tensor:
    """`(byte - zero) × scale` with a floating zero."""
    return _affine(weight.parts["weight"], weight)


def _affine(codes: Tensor, weight: PackedWeight) -> Tensor:
    assert weight.block is not None
    scale, zero = weight.parts["scale"].float(), weight.parts["zero"].float()
    group = weight.parts.get("group")
    if group is not None:
        index = group.long()
        return (codes.float() - zero[:, index]) * scale[:, index]
    rows, columns = weight.shape
    grouped = codes.float().view(rows, columns // weight.block[1], weight.block[1])
    return ((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(rows, columns)


def unpack_cyclic4(weight: PackedWeight) -> Tensor:
    """`(nibble - zero) × scale`, scales repeating every so many elements in row-major order."""
    return _cyclic(unpack_nibbles(weight.parts["weight"]), weight)


def unpack_cyclic8(weight: PackedWeight) -> Tensor:
    """`(byte - zero) × scale`, scales repeating every so many elements in row-major order."""
    return _cyclic(weight.parts["weight"], weight)


def _cyclic(codes: Tensor, weight: PackedWeight) -> Tensor:
    scale, zero = weight.parts["scale"].float(), weight.parts["zero"].float()
    return ((codes.float().view(-1, scale.numel()) - zero) * scale).view(weight.shape)


def unpack_table4(weight: PackedWeight) -> Tensor:
    """`table[nibble] × scale`, the scale multiplied by `factor` or divided by `divisor` first."""
    assert weight.block is not None
    rows, columns = weight.shape
    scale = weight.parts["scale"].float()
    if "factor" in weight.parts:
        scale = scale * weight.parts["factor"]
    if "divisor" in weight.parts:
        scale = scale / weight.parts["divisor"]
    values = weight.parts["table"][unpack_nibbles(weight.parts["weight"]).int()]
    return (values.view(rows, columns // weight.block[1], weight.block[1]) * scale.unsqueeze(-1)).view(rows, columns)


@dataclass(frozen=True)
class ScaledColumns:
    """Expands with another layout's function, then multiplies input i by `columns[i]`."""

    inner: Unpack

    def __call__(self, weight: PackedWeight) -> Tensor:
        return self.inner(weight) * weight.parts["columns"]


def scale_columns(weight: PackedWeight, columns: Tensor) -> PackedWeight:
    """A weight whose inputs are multiplied by `columns` (float32 `[in]`) after it is expanded."""
    parts = {**weight.parts, "columns": columns.to(torch.float32)}
    return PackedWeight(f"{weight.layout}_columns", weight.shape, parts, ScaledColumns(weight.unpack), weight.block)
