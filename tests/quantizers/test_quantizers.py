"""Quantizers and formats know each other by grid and codes only: any of one works with any of the other."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from amalgam.formats.contract import WritableFormat
from amalgam.formats.grid import Codes, Grid, QuantizeOptions
from amalgam.formats.registry import all_formats
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest

WRITABLE = [weight_format for weight_format in all_formats() if isinstance(weight_format, WritableFormat)]


@dataclass(frozen=True)
class ClipSearch:
    """For each block the best of several scales below the one that clips nothing: a quantizer with settings."""

    shares: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7)

    def __call__(self, weight: Tensor, grid: Grid) -> Codes:
        widest = round_to_nearest(weight, grid)
        (rows, columns), (height, width) = grid.shape, grid.block
        best, least = widest, torch.full(grid.scale_shape, torch.inf)
        for share in self.shares:
            scale = (widest.scale.float() * share).to(grid.scale_dtype)
            wide = scale.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
            scaled = weight.float() / wide
            values = (scaled if grid.dtype.is_floating_point else scaled.round()).clamp(grid.low, grid.high)
            values = values.to(grid.dtype)
            errors = (values.float() * wide - weight.float()).square()
            error = torch.stack([part.sum() for row in errors.split(height) for part in row.split(width, 1)])
            is_better = error.view(grid.scale_shape) < least
            least = torch.where(is_better, error.view(grid.scale_shape), least)
            chosen = is_better.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
            values = torch.where(chosen, values.float(), best.values.float()).to(grid.dtype)
            best = Codes(grid, values, torch.where(is_better, scale, best.scale))
        return best


def error_of(weight: Tensor, restored: Tensor) -> float:
    return float((restored - weight.float()).norm() / weight.float().norm())


@pytest.mark.parametrize("target", WRITABLE, ids=lambda target: target.name)
@pytest.mark.parametrize("shape", [(200, 160), (16, 32)], ids=str)
def test_another_quantizer_feeds_every_format_that_can_be_made(target: WritableFormat, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    nearest = target.pack(quantize(weight, target, round_to_nearest)).dequantize()
    searched = target.pack(quantize(weight, target, ClipSearch())).dequantize()
    assert error_of(weight, searched) <= error_of(weight, nearest)
    if target.name == "int4":
        assert not torch.equal(nearest, searched)


@pytest.mark.parametrize("target", WRITABLE, ids=lambda target: target.name)
def test_what_is_packed_are_the_codes_times_their_scales(target: WritableFormat) -> None:
    torch.manual_seed(1)
    weight = torch.randn(24, 64).bfloat16()
    grid = target.grid((24, 64), weight.dtype)
    codes = round_to_nearest(weight, grid)
    assert codes.values.dtype == grid.dtype and codes.scale.dtype == grid.scale_dtype
    assert codes.values.shape == grid.shape and codes.scale.shape == grid.scale_shape
    assert grid.low <= float(codes.values.float().min()) and float(codes.values.float().max()) <= grid.high
    scale = codes.scale.float().repeat_interleave(grid.block[0], 0)[:24].repeat_interleave(grid.block[1], 1)[:, :64]
    assert torch.equal(target.pack(target.encode(codes)).dequantize(), codes.values.float() * scale)


def test_every_value_takes_the_nearest_code_and_ties_the_even_one() -> None:
    grid = Grid((1, 8), (1, 8), "channel", torch.int8, -128, 127, 127.5, torch.float32)
    weight = torch.tensor([[127.5, 2.4, 2.5, 3.5, -0.4, -2.5, -127.5, 0.0]])
    assert round_to_nearest(weight, grid).values.tolist() == [[127, 2, 2, 4, 0, -2, -128, 0]]


def test_a_grid_has_blocks_as_asked() -> None:
    by_name = {target.name: target for target in WRITABLE}
    fp8, int4 = by_name["fp8"], by_name["int4"]
    assert fp8.grid((200, 160), torch.bfloat16, QuantizeOptions(scale="block")).scale_shape == (2, 2)
    assert fp8.grid((200, 160), torch.bfloat16, QuantizeOptions(scale="tensor")).scale_shape == (1, 1)
    assert int4.grid((200, 160), torch.bfloat16, QuantizeOptions(group_size=16)).scale_shape == (200, 10)
