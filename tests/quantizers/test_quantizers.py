"""Quantizers and formats know each other by grid and codes only: any of one works with any of the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from amalgam.formats.contract import WritableFormat
from amalgam.formats.grid import Grid, QuantizeOptions
from amalgam.formats.registry import all_formats
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.gptq import Gptq
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.quantizers.search import ClipSearch

WRITABLE = [weight_format for weight_format in all_formats() if isinstance(weight_format, WritableFormat)]


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
    assert torch.equal(codes.dequantize(), codes.values.float() * scale)


def output_error(weight: Tensor, restored: Tensor, x: Tensor) -> float:
    return float((x @ (restored - weight.float()).T).norm())


OPTIONS = [
    ("int4", QuantizeOptions(group_size=32)),
    ("int4", QuantizeOptions(group_size=32, has_zero_points=True)),
    ("int3", QuantizeOptions(scale="channel")),
    ("int2", QuantizeOptions(group_size=16, has_zero_points=True)),
    ("int8", QuantizeOptions(scale="tensor")),
    ("fp8", QuantizeOptions(scale="block")),
    ("mxfp4", QuantizeOptions()),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
def test_calibration_makes_the_output_error_smaller(name: str, options: QuantizeOptions) -> None:
    """Inputs of different sizes that depend on each other, as those of a model do."""
    torch.manual_seed(5)
    target = next(each for each in WRITABLE if each.name == name)
    weight = torch.randn(48, 160)
    x = (torch.randn(400, 40) @ torch.randn(40, 160) + torch.randn(400, 160)) * torch.rand(160).square()
    moment = x.T @ x / len(x)
    grid = target.grid((48, 160), weight.dtype, options)
    nearest, searched, weighted, gptq = (
        output_error(weight, target.pack(target.encode(quantizer(weight, grid))).dequantize(), x)
        for quantizer in (round_to_nearest, ClipSearch(), ClipSearch(moment), Gptq(moment, ClipSearch(moment)))
    )
    assert gptq < 0.75 * min(nearest, searched, weighted)
    if grid.block[0] == 1:  # a large block clips nothing
        assert weighted < min(nearest, searched)


def test_matrices_with_the_same_inputs_are_quantized_together_as_alone() -> None:
    torch.manual_seed(6)
    target = next(each for each in WRITABLE if each.name == "int4")
    weights = [torch.randn(24, 64), torch.randn(8, 64)]
    x = torch.randn(100, 64) @ torch.randn(64, 64)
    gptq = Gptq(x.T @ x, round_to_nearest)
    grids = [target.grid((len(weight), 64), weight.dtype) for weight in weights]
    pairs = list(zip(weights, grids, strict=True))
    for codes, (weight, grid) in zip(gptq.together(pairs), pairs, strict=True):
        alone = gptq(weight, grid)
        assert torch.equal(codes.values, alone.values) and torch.equal(codes.scale, alone.scale)


@pytest.mark.parametrize("moment", [torch.zeros(32, 32), torch.ones(32, 32), torch.ones(32, 32) / 3])
def test_inputs_that_say_little_still_give_codes(moment: Tensor) -> None:
    """No tokens at all, or one direction only."""
    target = next(each for each in WRITABLE if each.name == "int4")
    weight = torch.randn(8, 32)
    restored = Gptq(moment, round_to_nearest)(weight, target.grid((8, 32), weight.dtype)).dequantize()
    assert bool(torch.isfinite(restored).all())


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
