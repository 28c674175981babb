"""Every format that can quantize: round trip through a checkpoint, bytes, and the product with the weight."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.source import Source
from amalgam.errors import CheckpointError, ConfigError
from amalgam.formats.contract import ACTIVATION_SUFFIXES, WritableFormat
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import all_formats, writable_format
from amalgam.kernels.backends.cpu import mapped, panels
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.reference import operators as reference
from amalgam.kernels.layouts import dense as pack
from amalgam.kernels.layouts import pack_nibbles
from amalgam.kernels.weights import Layout, PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from tests.errors import raises
from tests.formats.layouts import LAYOUTS, get_format

CASES = [
    (writable_format("fp8"), QuantizeOptions(scale="tensor"), 0.04),
    (writable_format("fp8"), QuantizeOptions(scale="channel"), 0.04),
    (writable_format("fp8"), QuantizeOptions(scale="block"), 0.04),
    (writable_format("int8"), QuantizeOptions(), 0.02),
    (writable_format("int4"), QuantizeOptions(group_size=32), 0.12),
    (writable_format("int4"), QuantizeOptions(group_size=16), 0.12),
    (writable_format("int4"), QuantizeOptions(), 0.16),
    (writable_format("int4"), QuantizeOptions(scale="channel"), 0.18),
    (writable_format("int4"), QuantizeOptions(group_size=32, has_zero_points=True), 0.12),
    (writable_format("int3"), QuantizeOptions(group_size=32), 0.25),
    (writable_format("int3"), QuantizeOptions(group_size=32, has_zero_points=True), 0.25),
    (writable_format("int2"), QuantizeOptions(group_size=16), 0.55),
    (writable_format("int2"), QuantizeOptions(scale="channel", has_zero_points=True), 0.7),
    (writable_format("int8"), QuantizeOptions(scale="tensor"), 0.02),
    (writable_format("int8"), QuantizeOptions(group_size=32), 0.02),
    (writable_format("int8"), QuantizeOptions(has_zero_points=True), 0.02),
    (writable_format("int8-packed"), QuantizeOptions(group_size=16), 0.02),
    (writable_format("fp8-e5m2"), QuantizeOptions(), 0.08),
    (writable_format("mxfp4"), QuantizeOptions(), 0.16),
]
SHAPES = [(200, 160), (128, 256), (16, 32)]


def write_source(folder: Path, weight_format: WritableFormat, weight: torch.Tensor, options: QuantizeOptions) -> Source:
    encoded = quantize(weight, weight_format, round_to_nearest, options)
    write_checkpoint(folder, [(f"x.{suffix}", tensor) for suffix, tensor in encoded.tensors.items()])
    scheme = weight_format.scheme(encoded.grid)
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(scheme.arguments)}}
    declared = {"quant_method": "compressed-tensors", "format": scheme.layout, "config_groups": groups}
    (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
    return Source.open("test", str(folder))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("weight_format", "options", "tolerance"), CASES, ids=lambda value: getattr(value, "name", None)
)
def test_round_trip(
    weight_format: WritableFormat, options: QuantizeOptions, tolerance: float, shape: tuple[int, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[3] = 0  # a row without a largest value
    source = write_source(tmp_path, weight_format, weight, options)
    stored = source.weights["x.weight"]
    assert stored.format is weight_format
    assert stored.shape == shape

    packed = source.load(stored)
    restored = packed.dequantize()
    assert restored.dtype == torch.float32
    assert float((restored - weight).norm() / weight.norm()) < tolerance
    assert bool((restored[3] == 0).all())
    direct = weight_format.pack(quantize(weight, weight_format, round_to_nearest, options))
    assert torch.equal(direct.dequantize(), restored)

    x = torch.randn(5, shape[1])
    assert torch.equal(reference.linear(x, packed), reference.linear(x, dense(restored)))
    declared = weight_format.nbytes(shape, options)
    # A float32 checkpoint keeps float32 scales; the estimate is for the usual 16-bit ones.
    assert declared <= packed.nbytes <= declared * 1.25


def dense(tensor: torch.Tensor) -> PackedWeight:

    return pack(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_floating_weights_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(7, 5).to(dtype)
    write_checkpoint(tmp_path, [("a.weight", weight), ("a.bias", weight[:, 0]), ("norm", weight[0])])
    source = Source.open("test", str(tmp_path))
    assert {name: stored.shape for name, stored in source.weights.items()} == {
        "a.weight": (7, 5),
        "a.bias": (7,),
        "norm": (5,),
    }
    assert torch.equal(source.load(source.weights["a.weight"]).dequantize(), weight)


def test_packed_weights_do_not_share_the_files_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, [("a.weight", torch.ones(4, 4))])
    source = Source.open("test", str(tmp_path))
    packed = source.load(source.weights["a.weight"])
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\xff\xff\xff\xff")
    assert bool((packed.dequantize() == 1).all())


def test_asymmetric_int4_and_activation_order(tmp_path: Path) -> None:
    """Zero points are packed along the rows, `weight_g_idx` gives each input's group."""
    torch.manual_seed(1)
    rows, columns, group = 24, 32, 8
    values = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (rows, columns // group), dtype=torch.uint8)
    scale = torch.rand(rows, columns // group) + 0.5
    index = torch.randperm(columns).to(torch.int32) // group
    packed_zeros = pack_nibbles(zeros.t().contiguous()).view(torch.int32).t().contiguous()
    write_checkpoint(
        tmp_path,
        [
            ("x.weight_packed", pack_nibbles(values).view(torch.int32)),
            ("x.weight_scale", scale),
            ("x.weight_zero_point", packed_zeros),
            ("x.weight_g_idx", index),
            ("x.weight_shape", torch.tensor([rows, columns])),
        ],
    )
    source = Source.open("test", str(tmp_path))
    restored = source.load(source.weights["x.weight"]).dequantize()
    expected = (values.float() - zeros.float()[:, index.long()]) * scale[:, index.long()]
    assert torch.equal(restored, expected)


def test_qwen_block_scales_multiply_and_ragged_edges_are_cropped(tmp_path: Path) -> None:
    weight = torch.randn(200, 150).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2)
    write_checkpoint(tmp_path, [("x.weight", weight), ("x.weight_scale_inv", scale)])
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
    )
    source = Source.open("test", str(tmp_path))
    restored = source.load(source.weights["x.weight"]).dequantize()
    row, column = torch.arange(200) // 128, torch.arange(150) // 128
    assert torch.equal(restored, weight.float() * scale[row][:, column])


BESIDE_ACTIVATIONS = [
    name for name, layout in LAYOUTS.items() if get_format(layout.format).optional >= ACTIVATION_SUFFIXES
]
# As quantizers store them: per tensor, for all inputs, and one NaN, which no weight may have.
ACTIVATION_SCALES = {
    "input_scale": torch.tensor([0.037]),
    "input_zero_point": torch.tensor([-5], dtype=torch.int8),
    "input_global_scale": torch.tensor(700.0),
    "activation_scale": torch.full((1, 128), float("nan"), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", BESIDE_ACTIVATIONS)
def test_scales_of_activations_change_no_weight(name: str, tmp_path: Path) -> None:
    """Activations stay wide, so that what static quantization found for them is read past."""
    assert ACTIVATION_SCALES.keys() == ACTIVATION_SUFFIXES
    torch.manual_seed(4)
    tensors = LAYOUTS[name].make(64, 128)
    sources = []
    for folder, more in ((tmp_path / "alone", {}), (tmp_path / "beside", ACTIVATION_SCALES)):
        write_checkpoint(folder, [(f"x.{suffix}", tensor) for suffix, tensor in {**tensors, **more}.items()])
        (folder / "config.json").write_text(json.dumps({"quantization_config": LAYOUTS[name].quantization}))
        sources.append(Source.open("test", str(folder)))
    alone, beside = (source.load(source.weights["x.weight"]) for source in sources)
    assert [list(source.weights) for source in sources] == [["x.weight"], ["x.weight"]]
    assert (alone.layout, alone.block) == (beside.layout, beside.block)
    assert alone.parts.keys() == beside.parts.keys()
    assert torch.equal(alone.dequantize(), beside.dequantize())
    x = torch.randn(3, 128)
    assert torch.equal(reference.linear(x, alone), reference.linear(x, beside))


BROKEN = {
    "fp8 without a scale": ([("x.weight", torch.zeros(4, 8).to(torch.float8_e4m3fn))], "scales []"),
    "scale of the wrong shape": (
        [("x.weight", torch.zeros(4, 9, dtype=torch.int8)), ("x.weight_scale", torch.ones(3, 2))],
        "[3, 2]",
    ),
    "scale of the wrong type": (
        [("x.weight", torch.zeros(4, 8, dtype=torch.int8)), ("x.weight_scale", torch.ones(4, dtype=torch.int32))],
        "int32",
    ),
    "integers without a scale": ([("x.weight", torch.zeros(4, 8, dtype=torch.int32))], "int32"),
    "an unknown companion": (
        [("x.weight", torch.ones(4, 8)), ("x.weight_scale", torch.ones(4))],
        "weight_scale",
    ),
    "groups that do not divide": (
        [
            ("x.weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
            ("x.weight_scale", torch.ones(4, 3)),
            ("x.weight_shape", torch.tensor([4, 32])),
        ],
        "3 groups",
    ),
    "packed without a shape": (
        [("x.weight_packed", torch.zeros(4, 4, dtype=torch.int32)), ("x.weight_scale", torch.ones(4, 1))],
        "weight_packed",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_contradictions_are_refused_by_name(case: str, tmp_path: Path) -> None:
    tensors, named = BROKEN[case]
    write_checkpoint(tmp_path, tensors)
    with raises(CheckpointError, named, "x.weight"):
        Source.open("test", str(tmp_path))


def test_lying_shape_and_group_index_are_refused_when_read(tmp_path: Path) -> None:
    good = {
        "x.weight_packed": torch.zeros(4, 4, dtype=torch.int32),
        "x.weight_scale": torch.ones(4, 4),
        "x.weight_shape": torch.tensor([4, 32]),
    }
    for name, tensor, named in (
        ("x.weight_shape", torch.tensor([4, 31]), "[4, 31]"),
        ("x.weight_g_idx", torch.full((32,), 4, dtype=torch.int32), "0..3"),
    ):
        folder = tmp_path / name
        write_checkpoint(folder, list({**good, name: tensor}.items()))
        arguments = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}
        group = {"targets": ["Linear"], "weights": arguments, "format": "pack-quantized"}
        declared = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
        (folder / "config.json").write_text(json.dumps({"quantization_config": declared}))
        source = Source.open("test", str(folder))
        with raises(CheckpointError, named):
            source.load(source.weights["x.weight"])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("int4", QuantizeOptions(group_size=24)),
        ("int4", QuantizeOptions(scale="block")),
        ("int4", QuantizeOptions(group_size=32, scale="channel")),
        ("int8", QuantizeOptions(scale="block")),
        ("int8", QuantizeOptions(group_size=32, scale="channel")),
        ("fp8", QuantizeOptions(group_size=64)),
        ("fp8", QuantizeOptions(has_zero_points=True)),
        ("mxfp4", QuantizeOptions(group_size=64)),
        ("mxfp4", QuantizeOptions(has_zero_points=True)),
    ],
)
def test_options_that_do_not_apply_are_refused(name: str, options: QuantizeOptions) -> None:
    with pytest.raises(ConfigError):
        writable_format(name).grid((16, 64), torch.float32, options)


def test_every_format_is_found_once() -> None:
    names = [weight_format.name for weight_format in all_formats()]
    assert len(names) == len(set(names))
    assert {"fp32", "bf16", "fp16", "fp8", "int8", "int4"} <= set(names)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if not get_format(layout.format).is_wide])
def test_an_embedding_is_the_rows_of_the_weight(name: str, tmp_path: Path) -> None:
    """Whatever a layout's parts are: rows, or what all rows share."""
    torch.manual_seed(4)
    tensors = LAYOUTS[name].make(64, 128)
    write_checkpoint(tmp_path, [(f"x.{suffix}", tensor) for suffix, tensor in tensors.items()])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": LAYOUTS[name].quantization}))
    source = Source.open("test", str(tmp_path))
    packed = source.load(source.weights["x.weight"])
    ids = torch.tensor([3, 0, 63, 3])
    assert torch.equal(reference.embedding(ids, packed, torch.float32), packed.dequantize()[ids])


def test_nothing_is_assumed_of_a_foreign_layout() -> None:
    """Its parts have names, shapes and meanings that only its `unpack` knows."""
    parts = {"codes": torch.arange(6, dtype=torch.uint8), "scale": torch.tensor(0.5), "block": torch.ones(1, 1)}
    unpack = lambda weight: (weight.parts["codes"].float() * weight.parts["scale"]).view(weight.shape)  # noqa: E731
    layout = Layout("foreign", unpack)
    for block in (None, (1, 2), (3, 2)):
        weight = PackedWeight(layout, (3, 2), parts, block)
        assert panels.prepare(weight) is weight
        assert not mapped.can_be_mapped(weight)
        ids = torch.tensor([2, 0])
        assert torch.equal(CpuOperators.embedding(ids, weight, torch.float32), weight.dequantize()[ids])
        x = torch.randn(5, 2)
        assert torch.equal(CpuOperators.linear(x, weight), CpuOperators.linear(x, dense(weight.dequantize())))
