"""Products with weights in each layout that the kernels of a GPU read, against float64; rows of weights, bit by bit."""

from __future__ import annotations

import gc
import random as random_numbers
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import AFFINE4, SCALED8, scale_columns
from amalgam.kernels.weights import PackedWeight
from tests.errors import raises
from tests.kernels.weights import affine, dense, every_layout, int4, nf4, nvfp4, scaled8

pytest.importorskip("triton")

from amalgam.kernels.backends.triton import products
from amalgam.kernels.backends.triton.kinds import TritonWeight
from amalgam.kernels.backends.triton.operators import TritonOperators
from tests.kernels.triton.weights import HALF_STEP, SUMS, exact, mxfp4, random, ready

FP8, INT8 = torch.float8_e4m3fn, torch.int8
# As models are published, and what is awkward about each: rows that fill no tile, inputs that fill no step.
WEIGHTS = {
    "bf16": lambda shape: dense(shape, torch.bfloat16),
    "fp16": lambda shape: dense(shape, torch.float16),
    "fp32": lambda shape: dense(shape, torch.float32),
    "fp8 tensor": lambda shape: scaled8(shape, FP8, shape),
    "fp8 row": lambda shape: scaled8(shape, FP8, (1, shape[1])),
    "fp8 block": lambda shape: scaled8(shape, FP8, (128, 128)),
    "fp8 odd block": lambda shape: scaled8(shape, FP8, (24, 40)),
    "int8 row": lambda shape: scaled8(shape, INT8, (1, shape[1])),
    "int8 block": lambda shape: scaled8(shape, INT8, (128, 128)),
    "int4 row": lambda shape: int4(shape, shape[1], scale_type=torch.float32, has_zero=True),
    "int4 128": lambda shape: int4(shape, 128, scale_type=torch.float16),
    "int4 128 zero": lambda shape: int4(shape, 128, has_zero=True),
    "int4 64": lambda shape: int4(shape, 64),
    "int4 32 zero": lambda shape: int4(shape, 32, has_zero=True),
    "int4 24": lambda shape: int4(shape, 24, has_zero=True),
    "int4 order": lambda shape: int4(shape, 64, has_zero=True, has_order=True),
    "HQQ": lambda shape: affine(AFFINE4, shape, 64, torch.float16),
    "HQQ odd": lambda shape: affine(AFFINE4, shape, 24, torch.float16),
    "MXFP4": mxfp4,
    "NVFP4": lambda shape: nvfp4(shape, "factor"),
    "NVFP4 divided": lambda shape: nvfp4(shape, "divisor"),
    "NF4": lambda shape: nf4(shape, 64),
}
# Scales that multiply sums, or values that stay exact with theirs: nothing is rounded before it is multiplied.
IS_EXACT = {
    *("bf16", "fp16", "fp32", "fp8 tensor", "fp8 row", "fp8 block", "int8 row", "int8 block"),
    *("int4 row", "int4 128", "int4 128 zero", "int4 64", "MXFP4", "NVFP4", "NVFP4 divided"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in WEIGHTS]
    + [(name, torch.float32) for name in ("bf16", "fp8 block", "int4 32 zero")],
)
def test_product(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]((24, 384))
    x = random(3, 384).to(dtype)
    out = TritonOperators.linear(x, ready(weight), out_dtype=torch.float32)
    expected, magnitude = exact(x, weight)
    bound = SUMS + (0 if name in IS_EXACT else HALF_STEP[dtype])
    assert ((out - expected).abs() <= bound * magnitude).all()


@pytest.mark.parametrize(
    "name", ["bf16", "fp8-block", "int8-tensor", "int4-8", "int4-40-zero", "int4-8-order", "affine8-40"]
)
def test_inputs_that_fill_no_step(name: str) -> None:
    weight, x = every_layout((5, 200))[name], random(2, 200).bfloat16()
    expected, magnitude = exact(x, weight)
    out = TritonOperators.linear(x, ready(weight), out_dtype=torch.float32)
    assert ((out - expected).abs() <= (SUMS + HALF_STEP[torch.bfloat16]) * magnitude).all()


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed: int) -> None:
    dice = random_numbers.Random(seed)
    names = dice.sample([name for name in WEIGHTS if "24" not in name and "odd" not in name], 2)
    rows, inputs = dice.choice((1, 2, 9, 17, 40)), 128 * dice.randint(1, 3)
    weights = {name: WEIGHTS[name]((dice.randint(1, 150), inputs)) for name in names}
    x = random(rows, inputs, seed=seed).bfloat16()
    outs = TritonOperators.linears(x, [ready(weight) for weight in weights.values()])
    for out, (name, weight) in zip(outs, weights.items(), strict=True):
        expected, magnitude = exact(x, weight)
        bound = (SUMS + (0 if name in IS_EXACT else HALF_STEP[torch.bfloat16])) * magnitude + 2**-8 * expected.abs()
        assert ((out - expected).abs() <= bound).all(), (name, weight.shape, rows)


@pytest.mark.parametrize("name", ["fp16", "int4 128 zero", "fp8 block"])
def test_float16(name: str) -> None:
    weight, x = WEIGHTS[name]((20, 256)), random(2, 256).half()
    expected, magnitude = exact(x, weight)
    out = TritonOperators.linear(x, ready(weight))
    assert out.dtype is torch.float16
    assert ((out - expected).abs() <= SUMS * magnitude + 2**-11 * expected.abs()).all()


def test_several_weights_with_biases() -> None:
    names = ("int4 128", "bf16", "int4 128", "HQQ")
    heights = (70, 8, 130, 3)
    weights = [ready(WEIGHTS[name]((height, 128))) for name, height in zip(names, heights, strict=True)]
    biases = [random(70), None, None, random(3)]
    x = random(9, 256).bfloat16()[:, :128]  # rows with a gap between them
    together = TritonOperators.linears(x, weights, biases)
    assert len(products.stacks_of(weights, biases)) == 3  # one launch for each kind
    for out, weight, bias in zip(together, weights, biases, strict=True):
        assert torch.equal(out, TritonOperators.linear(x.contiguous(), weight, bias))
        assert out.is_contiguous() and out.dtype is torch.bfloat16
        expected = reference.linear(x.double(), weight, None if bias is None else bias.double())
        assert torch.allclose(out.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_ranges_of_inputs_cover_all_inputs_once() -> None:
    """Summed apart and in one program. With values whose sums are exact: their order on a card is not seen here."""
    weight = int4((40, 1024), 128, scale_type=torch.float16)
    weight.parts["scale"].fill_(0.5)
    read = ready(weight)
    assert products.stacks_of((read,), (None,))[0].ranges == 2
    x = torch.randint(-4, 5, (35, 1024), generator=torch.Generator().manual_seed(5)).bfloat16()
    expected = (x.double() @ weight.dequantize(torch.float64).T).float()
    many = TritonOperators.linear(x, read, out_dtype=torch.float32)
    assert torch.equal(many, expected)
    for rows in (1, 8, 17):
        assert torch.equal(TritonOperators.linear(x[:rows], read, out_dtype=torch.float32), expected[:rows])


def test_no_bias_comes_to_lie_where_another_has_been() -> None:
    """It would be taken for that one: a bias stays as long as the weight that it was multiplied with."""
    weight, x = ready(dense((8, 64), torch.bfloat16)), torch.zeros(1, 64, dtype=torch.bfloat16)
    biases = [torch.full((8,), value, dtype=torch.bfloat16) for value in (1.0, 5.0)]
    for bias in biases:
        assert torch.equal(TritonOperators.linear(x, weight, bias), bias[None])
    left = [weakref.ref(bias) for bias in biases]
    del bias, biases
    assert all(bias() is not None for bias in left)
    del weight
    gc.collect()
    assert all(bias() is None for bias in left)


def test_no_rows() -> None:
    assert TritonOperators.linear(random(0, 64).bfloat16(), ready(WEIGHTS["int4 64"]((16, 64)))).shape == (0, 16)


def test_rows_of_another_width() -> None:
    with raises(ValueError, 64, 128):
        TritonOperators.linear(random(1, 64), ready(WEIGHTS["int4 64"]((16, 128))))


@pytest.mark.parametrize("name", WEIGHTS)
def test_embedding(name: str) -> None:
    ids, weight = torch.tensor([6, 0, 6]), WEIGHTS[name]((7, 384))
    expected = reference.embedding(ids, weight, torch.bfloat16)
    assert torch.equal(TritonOperators.embedding(ids, ready(weight), torch.bfloat16), expected)


def test_every_code_of_fp8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    weight = PackedWeight(SCALED8, (1, 256), {"weight": codes.view(FP8), "scale": torch.ones(1, 1)}, (1, 256))
    out = TritonOperators.embedding(torch.tensor([0]), ready(weight), torch.float32)
    assert torch.equal(out.nan_to_num(1000.0), codes.view(FP8).float().nan_to_num(1000.0))


def test_nibbles_as_bits_of_bfloat16() -> None:
    """What a card does in place of the interpreter's float32: 128 + code, by its bits, less 128 + zero point."""
    codes = torch.arange(16, dtype=torch.int16)
    for zero in range(17):
        values = (codes | 0x4300).view(torch.bfloat16) - torch.tensor(128.0 + zero).bfloat16()
        assert torch.equal(values.int(), codes.int() - zero)


def test_what_no_kernel_reads() -> None:
    """It is multiplied by torch, and what runs it is said."""
    weight = scale_columns(int4((16, 64), 64), torch.rand(64))
    assert TritonWeight.of(weight) is weight
    x = random(2, 64)
    assert torch.equal(TritonOperators.linear(x, weight), reference.linear(x, weight))
    codes = every_layout((16, 64))["codebooks-2x8-8"]
    assert TritonWeight.of(codes) is codes


def test_threads_do_not_count_together() -> None:
    """Ranges that have arrived are counted in the card's memory, and another thread may launch on another stream."""
    weight = ready(dense((64, 1024), torch.bfloat16))
    (stack,) = products.stacks_of((weight,), (None,))
    ours = stack.arrived()
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(stack.arrived).result()
    assert len(ours) and stack.arrived() is ours and theirs is not ours
    TritonOperators.linear(random(1, 1024).bfloat16(), weight)
    assert not ours.any()
