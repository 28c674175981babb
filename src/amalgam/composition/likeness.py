"""Whether two versions of a matrix, each rounded in its own way, are one matrix in one basis.

In: rows of both, and how far rounding may have moved each value. Out: what became of each axis.
Must never know: which weights these are, files, formats.

Rounding moves every value a little, in no direction of its own. Tools that change a basis move rows and columns: by a
factor each, or into one another. So three things are looked at, and no single value:

- how much of a row, or of a column, is left over when the other version's is taken away: rounding of the kind that
  the formats do leaves a known amount, learned rounding (GPTQ, AutoRound) several times as much, another row all of it;
- the factors between rows, and between columns. Rounding leaves them alike, coarse rounding within a part of its own
  size. Each is estimated twice, from two halves of the other axis: what both halves say is no accident;
- the factor of the whole.

A difference that is smaller than rounding's own, and without structure, is not told from rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# What may be left over of the whole, as a share of its energy: at least, and in units of rounding.
_LEAST_LEFT = 0.01
_ROUNDINGS = 25.0
# Two matrices that have nothing to do with each other stay below it, whatever was rounded how.
_LEAST_COSINE = 0.3
# Where rounding alone is a larger share of the energy, a row's or column's factor is not told.
_TOLD_BELOW = {1: 0.4, 0: 0.1}
# Coarse rounding shrinks rows (1) and columns (0) unevenly, by up to such a part of what it moves each value by.
_LEAST_SPREAD = 0.01
_SPREAD_OF_ROUNDING = {1: 0.35, 0: 0.7}
# Formats that cannot hold the largest value of a group shrink the whole a little.
_LEAST_FACTOR = 0.03
_FACTOR_OF_ROUNDING = 0.75
_TOLD_OF_ALL = 0.3  # of the rows or columns, to tell anything of them
_FEWEST = 4  # values to tell factors from, where there are many of them
_FEWEST_FOR_ONE = 32  # values to tell the factor of a single row or column from
_DEVIATIONS_OF_ONE = 5
_OTHER = 0.5  # a row whose factor is so far from the others' is another row
_DEVIATIONS_OF_ALL = 4
_FARTHEST = 3  # in units of what is allowed: a few that are off are not all
_SURE_BELOW = 0.07  # rounding, as a share of the values: finer than 4 bits
_ROUNDS = 4  # of fitting factors of both axes


class Axis(Enum):
    """What became of an axis between two versions of a matrix."""

    SAME = "same"
    MOVED = "moved"  # factors, or some of its rows are others
    UNTOLD = "untold"  # the two have nothing in common: this axis or the other one


@dataclass(frozen=True)
class Likeness:
    """How two versions of a matrix `[out, in]` compare.

    `is_sure` is false where only columns differ and rounding is coarse: learned rounding moves some of them far.
    """

    outputs: Axis
    inputs: Axis
    is_sure: bool = True

    @property
    def is_same(self) -> bool:
        return self.outputs is Axis.SAME and self.inputs is Axis.SAME


SAME = Likeness(Axis.SAME, Axis.SAME)
UNTOLD = Likeness(Axis.UNTOLD, Axis.UNTOLD)


def compare(one: Tensor, other: Tensor, rounding_one: Tensor, rounding_other: Tensor) -> Likeness:
    """Compare some rows of two versions of a matrix.

    Args:
        one, other: float32 `[rows, inputs]`.
        rounding_one, rounding_other: the expected square of each value's rounding error, of the same shape.
    """
    if torch.equal(one, other):
        return SAME
    one, other, rounding_one, rounding_other = (
        part.nan_to_num(0.0, 0.0, 0.0) for part in (one, other, rounding_one, rounding_other)
    )
    if float(rounding_one.sum()) > float(rounding_other.sum()):
        one, other, rounding_one, rounding_other = other, one, rounding_other, rounding_one
    x, y = one, other
    size = float(y.abs().max()), float(x.abs().max())
    if min(size) == 0:
        return SAME if max(size) == 0 else UNTOLD
    if _cosine(x, y) < _LEAST_COSINE and not _is_rescaled(x, y):
        return UNTOLD
    noise = rounding_one + rounding_other
    share = math.sqrt(float(noise.sum() / y.square().sum()))
    columns = torch.ones(x.shape[1])
    for _ in range(_ROUNDS):
        moved_rows = _are_uneven(x * columns, y, noise, 1)
        rows = _factors(x * columns, y, 1)
        scaled = x * rows.unsqueeze(1)
        moved_columns = _are_uneven(scaled, y, noise, 0)
        if not moved_columns:
            break
        columns = _factors(scaled, y, 0)
    fitted = x * rows.unsqueeze(1) * columns
    cosines = (fitted * y).sum(1) / (fitted.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-30)
    left = float((y - fitted).square().sum() / y.square().sum())
    if float(cosines.median()) < _LEAST_COSINE or left > max(_LEAST_LEFT, _ROUNDINGS * share**2):
        return UNTOLD
    if not moved_rows and not moved_columns and abs(_middle(x, y, 1) - 1) > _LEAST_FACTOR + _FACTOR_OF_ROUNDING * share:
        return UNTOLD  # a factor of the whole belongs to either axis
    outputs, inputs = (Axis.MOVED if is_moved else Axis.SAME for is_moved in (moved_rows, moved_columns))
    return Likeness(outputs, inputs, moved_rows or share < _SURE_BELOW)


def _cosine(x: Tensor, y: Tensor) -> float:
    return float((x * y).sum() / (x.norm() * y.norm()))


def _is_rescaled(x: Tensor, y: Tensor) -> bool:
    """Whether unequal factors hide that two matrices are alike: then most values have one sign in both."""
    is_there = (x != 0) & (y != 0)
    agree = (x.sign() == y.sign())[is_there].float()
    return len(agree) > 0 and abs(float(agree.mean()) - 0.5) > 0.25


def _factors(x: Tensor, y: Tensor, dim: int) -> Tensor:
    """What to multiply x's rows (1) or columns (0) by to come nearest to y's; 1 where x is empty."""
    energy = x.square().sum(dim)
    return torch.where(energy > 0, (x * y).sum(dim) / energy.clamp(min=1e-30), torch.ones(()))


def _are_uneven(x: Tensor, y: Tensor, noise: Tensor, dim: int) -> bool:
    """Whether rows (1) or columns (0) of y are those of x times factors that are not alike."""
    count = x.shape[dim]
    if count < _FEWEST:
        return False
    energy, product = x.square().sum(dim), (x * y).sum(dim)
    squared_cosine = product.square() / (energy * y.square().sum(dim)).clamp(min=1e-38)
    middle = _middle(x, y, dim)
    if count >= _FEWEST_FOR_ONE and _has_others(x, y, noise, dim, middle):
        return True
    halves = [(x[:, part::2], y[:, part::2]) if dim else (x[part::2], y[part::2]) for part in (0, 1)]
    energies = [half.square().sum(dim) for half, _ in halves]
    told = (squared_cosine > 1 - _TOLD_BELOW[1]) & (energies[0] > 0) & (energies[1] > 0)
    if int(told.sum()) < max(2, _TOLD_OF_ALL * len(told)):
        return False
    allowed = (_SPREAD_OF_ROUNDING[dim] * (1 - squared_cosine[told]).clamp(min=0).sqrt()).clamp(min=_LEAST_SPREAD)
    weight = torch.minimum(*energies)[told]
    weight = weight.clamp(max=4 * float(weight.median()))
    weight = weight / weight.sum()
    offs = (_off(*half, dim, middle)[told] / allowed for half in halves)
    first, second = (off.clamp(-_FARTHEST, _FARTHEST) for off in offs)
    covariance = float((weight * first * second).sum())
    # How far the covariance of so many pairs of independent errors lies from 0 by accident.
    accident = float((weight.square() * (first - second) ** 4).sum().sqrt()) / math.sqrt(12)
    return covariance - _DEVIATIONS_OF_ALL * accident > 1


def _has_others(x: Tensor, y: Tensor, noise: Tensor, dim: int, middle: float) -> bool:
    """Whether some rows (1) or columns (0) of y are not those of x."""
    energy = x.square().sum(dim)
    told = noise.sum(dim) < _TOLD_BELOW[dim] * energy
    left = y - _factors(x, y, dim).unsqueeze(dim) * x
    # A factor's own error, told from the leftovers (White 1980): they are no more alike than the values are.
    accidents = (x * left).square().sum(dim).sqrt() / energy.clamp(min=1e-38) / middle
    return bool((told & (_off(x, y, dim, middle).abs() > _OTHER + _DEVIATIONS_OF_ONE * accidents)).any())


def _bounds(x: Tensor, y: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Between which two numbers the factors from x's rows (1) or columns (0) to y's lie.

    Errors in x make a factor's estimate too small, errors in y that of its inverse.
    """
    product = (x * y).sum(dim)
    least = product / x.square().sum(dim).clamp(min=1e-30)
    return least, torch.where(product > 0, y.square().sum(dim) / product.clamp(min=1e-30), least)


def _middle(x: Tensor, y: Tensor, dim: int) -> float:
    """The factor of the whole: 1 if it can be, as rounding has none."""
    least, most = (float(bound.median()) for bound in _bounds(x, y, dim))
    return max(min(max(least, 1.0), most), 1e-6)


def _off(x: Tensor, y: Tensor, dim: int, middle: float) -> Tensor:
    """How far the factors are from `middle` at least, as a share of it."""
    least, most = _bounds(x, y, dim)
    return (least / middle - 1).clamp(min=0) + (most / middle - 1).clamp(max=0)
