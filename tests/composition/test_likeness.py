"""Rounding of every kind is no movement, and movement is seen through it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from amalgam.composition.likeness import Axis, compare
from amalgam.composition.rounding import rounding_of
from amalgam.formats.contract import StoredWeight

Rounder = Callable[[Tensor], Tensor]
ROWS, COLUMNS = 128, 512
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def trained(kind: str, rows: int = ROWS) -> Tensor:
    """Weights as models have them: even, with a few large columns, or with rows and values of very unequal size."""
    generator = torch.Generator().manual_seed(rows)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = noise(rows, COLUMNS) * 0.02
    if kind == "large columns":
        weight *= torch.exp(0.5 * noise(COLUMNS))
        weight[:, ::71] *= 15
    if kind == "heavy tails":
        weight *= torch.exp(0.8 * noise(rows, COLUMNS)) * torch.exp(0.5 * noise(rows, 1))
    return weight.bfloat16().float()


def grid(bits: int, group: int, *, least: float = 1.0) -> Rounder:
    """To integers; the largest value of a group may lie beyond the grid, as where clipping is searched."""

    def apply(weight: Tensor) -> Tensor:
        grouped = weight.unflatten(1, (-1, group))
        low, high = (grouped.amin(-1, True).clamp(max=0) * least, grouped.amax(-1, True).clamp(min=0) * least)
        step = ((high - low) / (2**bits - 1)).clamp(min=1e-9)
        zero = (-low / step).round()
        return (((grouped / step + zero).round().clamp(0, 2**bits - 1) - zero) * step).flatten(1)

    return apply


def fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().amax() / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def mxfp4(weight: Tensor) -> Tensor:
    """The largest values of a group do not fit."""
    grouped = weight.unflatten(1, (-1, 32))
    scale = 2.0 ** (grouped.abs().amax(-1, True).log2().floor() - 2)
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return (table[(grouped / scale).unsqueeze(-1).sub(table).abs().argmin(-1)] * scale).flatten(1)


def learned(weight: Tensor) -> Tensor:
    """GPTQ (Frantar et al. 2022): what rounding a column does is made good by the next ones, so that values move
    further than rounding alone moves them."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(2 * COLUMNS, COLUMNS, generator=generator) * torch.exp(
        torch.randn(COLUMNS, generator=generator)
    )
    second = (inputs.T @ inputs).double()
    second += 0.01 * second.diag().mean() * torch.eye(COLUMNS)
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second)), upper=True)
    rest, rounded = weight.double().clone(), torch.empty_like(weight)
    for column in range(COLUMNS):
        if column % 128 == 0:
            step = rest[:, column : column + 128].abs().amax(1) / 7.5
        values = (rest[:, column] / step).round().clamp(-8, 7) * step
        rounded[:, column] = values
        error = (rest[:, column] - values) / factor[column, column]
        rest[:, column:] -= error[:, None] * factor[column, column:]
    return rounded


def vectors(weight: Tensor) -> Tensor:
    """Two codebooks of 256 vectors for 8 inputs, the second of what the first leaves over (k-means)."""
    scale = weight.square().mean(1, keepdim=True).sqrt()
    points = (weight / scale).view(-1, 8)
    left = points.clone()
    for _ in range(2):
        book = left[:: len(left) // 256][:256].clone()
        for _ in range(3):
            nearest = torch.cdist(left, book).argmin(1)
            counts = torch.bincount(nearest, minlength=256).unsqueeze(1)
            sums = torch.zeros_like(book).index_add_(0, nearest, left)
            book = torch.where(counts > 0, sums / counts.clamp(min=1), book)
        left = left - book[torch.cdist(left, book).argmin(1)]
    return (points - left).view_as(weight) * scale


# Name → how values are rounded, bits, values that share a scale, and the kind of numbers.
FORMATS: dict[str, tuple[Rounder, int, int, str]] = {
    "wide": (lambda weight: weight, 16, 1, "wide"),
    "wide once rounded": (grid(4, 64), 16, 1, "wide"),
    "fp8": (fp8, 8, COLUMNS, "float"),
    "int8": (grid(8, COLUMNS), 8, COLUMNS, "int"),
    "int4": (grid(4, 128), 4, 128, "int"),
    "int4 clipped": (grid(4, 128, least=0.8), 4, 128, "int"),
    "gptq": (learned, 4, 128, "int"),
    "mxfp4": (mxfp4, 4, 32, "float"),
    "int3": (grid(3, 64), 3, 64, "int"),
    "int2": (grid(2, 32), 2, 32, "int"),
    "vectors": (vectors, 2, COLUMNS, "vectors"),
}
KINDS = ("even", "large columns", "heavy tails")


@cache
def trained_version(kind: str, name: str) -> tuple[Tensor, Tensor]:
    return version(trained(kind), name)


def version(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A weight in a format, and what its rounding is expected to do."""
    rounder, bits, group, number = FORMATS[name]
    values = rounder(weight)
    weight_format = SimpleNamespace(bits=bits, number=number, has_vectors=number == "vectors")
    stored: Any = SimpleNamespace(is_wide=number == "wide", bits=bits, block=(1, group), format=weight_format)
    return values, rounding_of(cast("StoredWeight", stored), values)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_no_movement(name: str, kind: str) -> None:
    mine = trained_version(kind, name)
    for other in list(FORMATS)[list(FORMATS).index(name) :]:  # each two once: the coarser one is taken for the second
        if {name, other} == {"gptq", "int2"}:
            continue  # 2 bits beside weights that were moved on purpose: a column can be lost in both
        theirs = trained_version(kind, other)
        assert compare(mine[0], theirs[0], mine[1], theirs[1]).is_same, other


def rotated(weight: Tensor, size: int) -> Tensor:
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(3)))[0]
    return (weight.unflatten(1, (-1, size)) @ turn).flatten(1)


def factors(count: int, spread: float) -> Tensor:
    return torch.exp(spread * torch.randn(count, generator=torch.Generator().manual_seed(4)))


ORDER = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))
SIGNS = torch.where(torch.arange(COLUMNS) % 2 == 0, 1.0, -1.0)
MOVEMENTS: dict[str, tuple[Callable[[Tensor], Tensor], Axis | None, Axis | None]] = {
    "rotated": (lambda w: rotated(w, COLUMNS), Axis.UNTOLD, Axis.UNTOLD),
    "rotated in blocks": (lambda w: rotated(w, 16), Axis.UNTOLD, Axis.UNTOLD),
    "columns exchanged": (lambda w: w[:, ORDER], Axis.UNTOLD, Axis.UNTOLD),
    "rows exchanged": (lambda w: w.flip(0), Axis.UNTOLD, Axis.UNTOLD),
    "half of the rows exchanged": (lambda w: torch.cat((w[: ROWS // 2].flip(0), w[ROWS // 2 :])), None, None),
    "signs": (lambda w: w * SIGNS, None, None),
    "factors of rows": (lambda w: w * factors(ROWS, 0.5)[:, None], Axis.MOVED, Axis.SAME),
    "factors of columns": (lambda w: w * factors(COLUMNS, 1.0), Axis.SAME, Axis.MOVED),
    "factors of both": (lambda w: w * factors(ROWS, 0.5)[:, None] * factors(COLUMNS, 0.5), Axis.MOVED, None),
    "twice as large": (lambda w: w * 2, Axis.UNTOLD, Axis.UNTOLD),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("movement", MOVEMENTS)
def test_movement_is_seen_through_rounding(movement: str, kind: str) -> None:
    move, outputs, inputs = MOVEMENTS[movement]
    moved = move(trained(kind))
    for name in ("wide", "fp8", "int4", "int4 clipped", "mxfp4", "vectors"):
        theirs = version(moved, name)
        for own in ("wide", "int4"):
            mine = trained_version(kind, own)
            found = compare(mine[0], theirs[0], mine[1], theirs[1])
            assert not found.is_same, (name, own)
            assert outputs is None or found.outputs is outputs, (name, own)
            assert inputs is None or found.inputs is inputs, (name, own)


@pytest.mark.parametrize("name", ["wide", "fp8", "int8"])
@pytest.mark.parametrize("spread", [0.03, 0.1])
def test_small_factors_are_seen_where_rounding_is_small(name: str, spread: float) -> None:
    weight = trained("even")
    mine, theirs = version(weight, "wide"), version(weight * factors(ROWS, spread)[:, None], name)
    assert compare(mine[0], theirs[0], mine[1], theirs[1]).outputs is Axis.MOVED


@pytest.mark.parametrize("empty", [(0, 0), (0, 1), (1, 0)])
def test_nothing_is_nothing(empty: tuple[int, int]) -> None:
    one, other = (trained("even") * size for size in empty)
    rounding = torch.zeros_like(one)
    assert compare(one, other, rounding, rounding).is_same is (empty == (0, 0))
