"""Linear weights in panels, against the reference: every layout, every instruction set."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from functools import cache

import pytest
import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension, panels
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.cpu.panels import ActivationType
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import (
    DENSE,
    PANELS_BF16,
    PANELS_BF16_CODED,
    PANELS_INT1,
    PANELS_INT2,
    PANELS_INT3,
    PANELS_INT4,
    SCALED8,
)
from amalgam.kernels.weights import PackedWeight
from tests.errors import raises
from tests.kernels.weights import (
    QUANTIZED,
    SHAPES,
    codebooks,
    coded,
    dense,
    every_layout,
    few_bits,
    int4,
    scaled8,
    scattered,
)

# Relative to the largest result. bf16: both sides round the result, the reference the weights too; int8 activations
# are off by up to 1/254 of a group's largest.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.01}
QUANTIZED_TOLERANCE = 0.04
ROWS = (1, 2, 5, 8, 9, 20)
WIDE = (40, 264)
BLOCKS = (50, 512)  # a multiple of every block of GGUF

linear, prepare = CpuOperators.linear, panels.prepare

pytestmark = pytest.mark.skipif(not extension.is_available(), reason=str(extension.why_unavailable()))


def activations(rows: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(seed)).to(dtype)


@cache
def every_panel(shape: tuple[int, int], isa: str, activation: ActivationType = "int8") -> Mapping[str, PackedWeight]:
    """Name → panels, for each layout; made once for each instruction set, and left as they are."""
    return {name: prepare(weight, activation) for name, weight in every_layout(shape).items()}


def exact(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    result = x.double() @ weight.dequantize(torch.float64).T
    return result if bias is None else result + bias.double()


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("isa")
def test_panels_hold_the_same_values(shape: tuple[int, int]) -> None:
    for name, weight in every_layout(shape).items():
        packed = prepare(weight)
        assert isinstance(packed, panels.PanelWeight), name
        assert packed.shape == weight.shape and packed.is_floating == weight.is_floating
        original, restored = weight.dequantize(), packed.dequantize()
        assert restored.dtype == original.dtype, name
        assert torch.equal(restored, original), name
        assert packed.parts["weight"].data_ptr() % 64 == 0
        scale = weight.parts.get("scale")
        assert scale is None or packed.parts["scale"].dtype == scale.dtype


@pytest.mark.usefixtures("isa")
def test_bf16_is_coded_without_loss_where_it_gains() -> None:
    for shape in ((16, 128), (33, 200), (7, 1000), (130, 264)):
        weight = coded(shape)
        packed = prepare(weight)
        assert packed.layout is PANELS_BF16_CODED
        assert packed.nbytes < 2 * math.prod(size + -size % unit for size, unit in zip(shape, (16, 8), strict=True))
        assert torch.equal(packed.dequantize().view(torch.int16), weight.dense.view(torch.int16))  # -0.0 is kept
        assert prepare(weight, codes=False).layout is PANELS_BF16
    assert prepare(coded((1, 8))).layout is PANELS_BF16
    assert prepare(scattered((16, 128))).layout is PANELS_BF16


def test_coded_bytes_are_the_same_on_every_instruction_set(use_isa: Callable[[str], None]) -> None:
    """Sizes around those of a register and of a block, incomplete panels, and exceptions everywhere."""
    from amalgam import _native

    shapes = [(rows, columns) for rows in (16, 19, 64) for columns in (128, 136, 152, 512, 1003, 1040, 2048)]
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    everything = torch.full((512, len(bits)), 0.5).bfloat16()
    everything[3] = bits.view(torch.bfloat16)
    sources = [*map(coded, shapes), PackedWeight(DENSE, tuple(everything.shape), {"weight": everything})]
    use_isa("portable")
    expected = [prepare(source) for source in sources]
    for isa in (isa for isa in _native.supported_isas() if isa != "portable"):
        use_isa(isa)
        for source, one in zip(sources, expected, strict=True):
            other = prepare(source)
            assert one.layout is other.layout is PANELS_BF16_CODED
            assert torch.equal(*(weight.matrix.memory for weight in (one, other))), (isa, source.shape)


@pytest.mark.usefixtures("isa")
def test_the_whole_range_of_bf16_can_be_coded() -> None:
    """Every exponent, NaN and infinity among them, and windows at both ends of the exponents."""
    bits = torch.cat([torch.arange(start, 65536, 128, dtype=torch.int32) for start in (0, 1, 127)]).to(torch.int16)
    for base in (0.0, 1.2e-38, 3.3e38):
        values = torch.full((512, len(bits)), base).bfloat16()
        values[3] = bits.view(torch.bfloat16)
        packed = prepare(PackedWeight(DENSE, tuple(values.shape), {"weight": values}))
        assert packed.layout is PANELS_BF16_CODED, base
        restored = packed.dequantize()
        assert torch.equal(restored.isnan(), values.isnan())
        is_number = ~values.isnan()
        assert torch.equal(restored[is_number].view(torch.int16), values[is_number].view(torch.int16))
    subnormal = PackedWeight(DENSE, (16, 512), {"weight": torch.full((16, 512), 1e-39).bfloat16()})
    assert prepare(subnormal).layout is PANELS_BF16


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_means_what_the_reference_says(isa: str, shape: tuple[int, int]) -> None:
    pairs = [(rows, torch.bfloat16) for rows in ROWS] + [(rows, torch.float32) for rows in ROWS[::2]]
    inputs = {(rows, dtype): activations(rows, shape[1], dtype) for rows, dtype in pairs}
    for name, weight in every_layout(shape).items():
        packed, values = every_panel(shape, isa)[name], weight.dequantize(torch.float64).T
        for (rows, dtype), x in inputs.items():
            result = linear(x, packed)
            assert result.dtype == dtype and result.shape == (rows, shape[0])
            is_rounded = dtype == torch.bfloat16 and name.startswith(QUANTIZED)
            tolerance = QUANTIZED_TOLERANCE if is_rounded else TOLERANCE[dtype]
            assert error(result, x.double() @ values) < tolerance, (name, rows, dtype)


def test_several_weights_in_one_call_give_what_each_gives_alone(isa: str) -> None:
    """All layouts at once, gathered ones among them, of different heights and with and without biases."""
    shapes = (5, BLOCKS[1]), (70, BLOCKS[1])
    layouts = [packed for shape in shapes for packed in every_panel(shape, isa).values()]
    biases = [None if index % 3 else torch.randn(weight.shape[0]) for index, weight in enumerate(layouts)]
    types = (*TOLERANCE, torch.float16)
    for rows in (0, 1, 3, 9, 130):
        for dtype in types if rows < 130 else (torch.bfloat16,):
            x = activations(rows, BLOCKS[1], dtype)
            together = CpuOperators.linears(x, layouts, biases)
            for result, weight, bias in zip(together, layouts, biases, strict=True):
                assert torch.equal(result, linear(x, weight, bias)), (weight.layout.name, rows, dtype)


def test_reference_takes_panels(isa: str) -> None:
    for name, weight in every_layout(BLOCKS).items():
        for dtype in TOLERANCE:
            x = activations(3, BLOCKS[1], dtype)
            assert torch.equal(reference.linear(x, every_panel(BLOCKS, isa)[name]), reference.linear(x, weight)), name


def test_wide_activations_for_integer_weights(isa: str) -> None:
    for name, weight in every_layout(BLOCKS).items():
        packed = every_panel(BLOCKS, isa, "bf16")[name]
        for rows in (1, 9):
            x = activations(rows, BLOCKS[1], torch.bfloat16)
            assert error(linear(x, packed), exact(x, weight)) < TOLERANCE[torch.bfloat16], (name, rows)


@pytest.mark.parametrize("shape", [(33, 200), BLOCKS, (7, 1000)])
def test_weights_are_rounded_to_bf16_and_nothing_else(isa: str, shape: tuple[int, int]) -> None:
    """With one input at a time, bf16 activations show what each weight has become."""
    x = torch.eye(shape[1], dtype=torch.bfloat16)
    for name, weight in every_layout(shape).items():
        if name.startswith(QUANTIZED):
            found = linear(x, every_panel(shape, isa, "bf16")[name])
            assert torch.equal(found, weight.dequantize(torch.float32).T.to(torch.bfloat16)), name


def quantize_activations(x: Tensor, chunk: int) -> Tensor:
    """What int8 activations stand for, in float64: symmetric, per token and chunk."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % chunk)).view(x.shape[0], -1, chunk)
    largest = padded.abs().amax(-1, keepdim=True)
    values = (padded * (127.0 / largest)).round()
    return (values.double() * (largest / 127.0).double()).flatten(1)[:, : x.shape[1]]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize(("group", "chunk"), [(8, 8), (24, 24), (128, 128), (192, 96), (384, 128)])
def test_activations_are_quantized_per_token_and_group(group: int, chunk: int) -> None:
    weight = int4((32, 384), group, has_zero=True)
    x = activations(6, 384, torch.bfloat16) * torch.logspace(-3, 3, 384).bfloat16()
    expected = quantize_activations(x, chunk) @ weight.dequantize(torch.float64).T
    assert error(linear(x, prepare(weight)), expected) < 0.005  # the rounding of the result


@pytest.mark.usefixtures("isa")
def test_extreme_integers_do_not_saturate() -> None:
    """All weights and activations at their limits: sums of pairs of products exceed 16 bits."""
    for value, code in ((-128, -128), (127, 127)):
        parts = {"weight": torch.full((16, 256), code, dtype=torch.int8), "scale": torch.ones(16, 1)}
        weight = PackedWeight(SCALED8, (16, 256), parts, (1, 256))
        for sign in (1, -1):
            x = torch.full((3, 256), 127.0 * sign).bfloat16()
            expected = torch.full((3, 16), 127.0 * sign * value * 256).bfloat16()
            torch.testing.assert_close(linear(x, prepare(weight)), expected, rtol=0.005, atol=0)


@pytest.mark.usefixtures("isa")
def test_every_fp8_code_is_right() -> None:
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    weight = PackedWeight(
        SCALED8,
        (254, 8),
        {"weight": codes[:, None].repeat(1, 8).view(torch.float8_e4m3fn), "scale": torch.ones(1, 1)},
        (254, 8),
    )
    packed = prepare(weight)
    expected = codes.view(torch.float8_e4m3fn).float()
    assert expected.abs()[expected != 0].min() == 2**-9
    for position in range(8):
        for rows in (1, 12):  # in registers, and expanded beforehand
            x = torch.zeros(rows, 8, dtype=torch.bfloat16)
            x[:, position] = 1.0
            assert torch.equal(linear(x, packed).float(), expected.expand(rows, -1)), position


def test_float32_results_do_not_depend_on_the_layout(isa: str) -> None:
    """A quantized weight and the dense weight of its values give the same bits."""
    for shape in ((33, 200), (48, 384), BLOCKS):
        for name, weight in every_layout(shape).items():
            values = weight.dequantize(torch.float32)
            packed, plain = every_panel(shape, isa)[name], prepare(PackedWeight(DENSE, shape, {"weight": values}))
            for rows in (1, 7, 30):
                x = activations(rows, shape[1], torch.float32)
                assert torch.equal(linear(x, packed), linear(x, plain)), name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_is_the_same_alone_in_a_batch_and_on_any_number_of_threads(
    isa: str, use_threads: Callable[[int], None], dtype: torch.dtype
) -> None:
    is_slow = isa in ("portable", "amx_emulated")
    counts, step = ((3,), 21) if is_slow else ((2, 3, 8, 64), 7)  # the slow ones share their work alike
    # Chunks of whole steps and others; in float32 a layout counts by its values alone, as another test shows.
    shape = ((130, 264), BLOCKS) if dtype == torch.bfloat16 else (BLOCKS,)
    for name, weight in [pair for one in shape for pair in every_layout(one).items()]:
        is_quantized = dtype == torch.bfloat16 and name.startswith(QUANTIZED)  # for others both are one path
        for activation in ("int8", "bf16") if is_quantized else ("int8",):
            packed = every_panel(weight.shape, isa, activation)[name]
            x = activations(150, weight.shape[1], dtype)
            use_threads(1)
            alone = torch.cat([linear(x[row : row + 1], packed) for row in range(0, 150, step)])
            together = linear(x, packed)
            assert torch.equal(together[::step], alone), name
            for end in (12, 19):  # 9 and 16 rows: from there on several panels are multiplied at once
                assert torch.equal(linear(x[3:end], packed), together[3:end]), name
            for threads in counts:
                use_threads(threads)
                assert torch.equal(linear(x, packed), together), name


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_integer_and_float32_products_have_the_same_bits_on_every_instruction_set(
    use_isa: Callable[[str], None], dtype: torch.dtype
) -> None:
    layouts = every_layout((65, 768))  # with as many panels as are multiplied at once
    if dtype == torch.bfloat16:
        layouts = {name: weight for name, weight in layouts.items() if name.startswith((*QUANTIZED, "fp16", "fp32"))}
    x = activations(16, 768, dtype)
    use_isa("portable")
    expected = {name: linear(x, prepare(weight)) for name, weight in layouts.items()}
    from amalgam import _native

    for isa in _native.supported_isas():
        use_isa(isa)
        for name, weight in layouts.items():
            assert torch.equal(linear(x, prepare(weight)), expected[name]), (isa, name)


@pytest.mark.parametrize("bias_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.usefixtures("isa")
def test_bias(dtype: torch.dtype, bias_type: torch.dtype) -> None:
    weight, bias = dense((37, 72), torch.bfloat16), activations(1, 37, torch.float32, 5)[0].to(bias_type) * 3
    for rows in (1, 10):
        x = activations(rows, 72, dtype)
        assert error(linear(x, prepare(weight), bias), exact(x, weight, bias)) < TOLERANCE[dtype]


@pytest.mark.usefixtures("isa")
def test_codes_of_sixteen_bits_name_every_vector() -> None:
    weight = codebooks((512, 1024), 1, 16, 8, torch.float16)
    weight.parts["weight"].view(-1)[:] = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    assert torch.equal(prepare(weight).dequantize(), weight.dequantize())


@pytest.mark.usefixtures("isa")
def test_embedding_reads_rows_from_panels() -> None:
    ids = torch.tensor([0, 129, 16, 15, 15, 77])
    for name, weight in every_layout((130, 264)).items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            result = CpuOperators.embedding(ids, prepare(weight), dtype)
            assert torch.equal(result, reference.embedding(ids, weight, dtype)), (name, dtype)
    packed = prepare(dense((5, 8), torch.float32))
    for wrong in (-1, 5):
        with raises(IndexError, wrong, 5):
            CpuOperators.embedding(torch.tensor([0, wrong]), packed, torch.float32)


def test_what_does_not_fit_stays_as_it_is() -> None:
    unequal = int4((16, 64), 32, has_order=True)
    unequal.parts["group"][0] = 1 - unequal.parts["group"][0]
    nan = scaled8((16, 64), torch.float8_e4m3fn, (16, 64))
    nan.parts["weight"].view(torch.uint8)[3, 5] = 0xFF
    vector = PackedWeight(DENSE, (64,), {"weight": torch.ones(64)})
    blocks = codebooks((8, 64), 1, 4, 8, torch.float16)
    blocks.parts["codebooks"] = blocks.parts["codebooks"].view(1, 8, 2, 8)  # vectors of two rows
    short = codebooks((8, 64), 1, 4, 4, torch.float16)
    for weight in (blocks, short, unequal, nan, vector, dense((4, 4), torch.float64)):
        assert prepare(weight) is weight
    packed = prepare(dense((4, 8), torch.float32))
    assert prepare(packed) is packed
    with raises(ValueError, "x", (2, 9), 8):
        linear(torch.ones(2, 9), packed)


def test_codes_are_packed_in_as_few_bits_as_they_need() -> None:
    for bits, layout in ((1, PANELS_INT1), (2, PANELS_INT2), (3, PANELS_INT3), (4, PANELS_INT4)):
        for zero in ("", "integer", "float"):
            packed = prepare(few_bits((32, 512), bits, 64, zero=zero))
            assert packed.layout is layout
            assert packed.parts["weight"].numel() == 32 * 512 * bits / 8
    shifted = few_bits((32, 512), 2, 64)
    shifted.parts["weight"][17, 5] = 0  # below what two bits around the middle have
    assert prepare(shifted).layout is PANELS_INT4
    assert prepare(few_bits((32, 512), 2, 8)).layout is PANELS_INT4  # 16 inputs are packed together


def test_bytes_are_those_that_are_published() -> None:
    for name, weight in every_layout((64, 1024)).items():
        published = weight.parts["weight"].nbytes
        if name.startswith(("q", "iq", "mxfp4")):
            assert published <= prepare(weight).nbytes < 1.037 * published + 128, name


def test_odd_widths_without_groups_fit() -> None:
    for columns in (1, 5, 13, 131):
        for weight in (
            dense((18, columns), torch.bfloat16),
            dense((18, columns), torch.float32),
            scaled8((18, columns), torch.int8, (1, columns)),
            scaled8((18, columns), torch.float8_e4m3fn, (128, 128)),
        ):
            packed = prepare(weight)
            assert packed is not weight
            assert torch.equal(packed.dequantize(), weight.dequantize())
            x = activations(9, columns, torch.float32)
            assert error(linear(x, packed), exact(x, weight)) < TOLERANCE[torch.float32]


def test_empty_steps_and_float16_activations() -> None:
    weight = prepare(dense((18, 40), torch.float16))
    assert linear(torch.empty(0, 40), weight).shape == (0, 18)
    x = activations(3, 40, torch.float16)
    assert linear(x, weight).dtype == torch.float16
    assert error(linear(x, weight), exact(x, weight)) < 2e-3


def test_nan_and_infinity_are_not_lost(isa: str) -> None:
    for name, packed in every_panel(BLOCKS, isa).items():
        for dtype in TOLERANCE:
            x = activations(3, BLOCKS[1], dtype)
            x[1, 7] = torch.nan
            result = linear(x, packed)
            assert result[1].isnan().all(), name
            assert result[[0, 2]].isfinite().all(), name


def test_memory_lives_as_long_as_a_part_and_is_used_again() -> None:
    def pack() -> PackedWeight:
        return prepare(dense((512, 512), torch.float32))

    weight = pack()
    lines = weight.parts["weight"]
    expected = lines.clone()
    del weight
    gc.collect()
    others = [pack() for _ in range(3)]
    assert torch.equal(lines, expected)
    del lines, others
    gc.collect()
    assert len({pack().parts["weight"].data_ptr() for _ in range(20)}) < 15  # a sanitizer holds freed memory back
