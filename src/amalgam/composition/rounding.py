"""How far rounding may have moved the values of a stored weight, from what its format says of its grid.

In: a stored weight and some of its values. Out: the expected square of each value's error. Must never know: layers,
what the values are compared with.

A value on a grid of `bits` bits that reaches from -m to m is moved by a twelfth of the square of 2m / (2^bits - 1), on
average. Where m is the largest value that shares its scale, that holds for every format within a factor of two. Eight
bits with a mantissa of three are finer near zero. Values stored wide may have been on a grid before: then few values
that share a scale differ, and the least distance between two of them is the step.

Vectors have no step. Of values of a normal distribution, a code of b bits for each leaves 4^-b of the energy at least
(Shannon 1959); codebooks leave half as much again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from amalgam.formats.contract import StoredWeight

_FP8_STEP = 2.0**-3  # of a value, as its mantissa has it
_BF16_STEP = 2.0**-8
_LARGEST_GROUP = 64  # outliers are local; a scale for a whole row is looked at in parts as well
_NEIGHBOURS = 16  # values that share a scale in every format
_LOSS_OF_VECTORS = 1.5


def rounding_of(stored: StoredWeight, values: Tensor) -> Tensor:
    """The expected square of the rounding error of some rows of a weight; float32 of their shape."""
    if stored.format.has_vectors:
        assert stored.bits is not None
        energy = values.square().mean(1, keepdim=True).expand_as(values)
        return energy * (_LOSS_OF_VECTORS / (4.0**stored.bits - 1))
    squares: Tensor = _grid(stored, values).square() / 12
    return squares


def _grid(stored: StoredWeight, values: Tensor) -> Tensor:
    """The distance between two neighbours on the grid of each value."""
    if stored.is_wide:
        return torch.maximum(values.abs() * _BF16_STEP, _step(values))
    bits = stored.bits or stored.format.bits or max(1, 8 * stored.nbytes // values[:1].numel() // stored.shape[0])
    if bits == 8 and stored.format.number == "float":
        return values.abs() * _FP8_STEP
    return _largest(stored, values) * (2.0 / float(2**bits - 1))


def _largest(stored: StoredWeight, values: Tensor) -> Tensor:
    """The largest magnitude among the inputs that share a scale, for each value."""
    columns = values.shape[1]
    group = min(stored.block[1] if stored.block is not None else _LARGEST_GROUP, columns)
    grouped: Tensor = pad(values.abs(), (0, -columns % group)).unflatten(1, (-1, group))
    return grouped.amax(-1, keepdim=True).expand_as(grouped).flatten(1)[:, :columns]


def _step(values: Tensor) -> Tensor:
    """The least distance between two different values among neighbours, for each value; 0 where all are equal."""
    columns = values.shape[1]
    whole = columns // _NEIGHBOURS * _NEIGHBOURS
    if not whole:
        return torch.zeros_like(values)
    near = values[:, :whole].unflatten(1, (-1, _NEIGHBOURS))
    gaps = near.sort(dim=-1).values.diff(dim=-1)
    largest = near.abs().amax(-1, keepdim=True)
    gaps = torch.where(gaps > 1e-4 * largest, gaps, torch.inf).amin(-1, keepdim=True)
    gaps = torch.where(gaps.isfinite(), gaps, torch.zeros(()))
    return pad(gaps.expand_as(near).flatten(1), (0, columns - whole), mode="replicate")
