"""Groups that do not divide the inputs of a row: the last one is shorter, in every format that can publish it so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from amalgam.checkpoint.writer import write_checkpoint
from amalgam.composition.source import Source
from amalgam.errors import CheckpointError, ConfigError
from amalgam.formats.grid import QuantizeOptions
from amalgam.formats.registry import writable_format
from amalgam.kernels.backends.cpu import extension, panels, products
from amalgam.kernels.layouts import dense
from amalgam.kernels.weights import PackedWeight
from tests.errors import raises
from tests.formats.layouts import ct

ROWS = 24
# (inputs, size of a group); what the last group has left is 64, 32, 8, 4 and 104 inputs.
SIZES = [(192, 128), (160, 128), (200, 64), (100, 32), (104, 128)]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def stream(codes: Tensor, bits: int) -> Tensor:
    """`[rows, n]` → int32 words, each row one stream of bits, low bits first."""
    rows, count = codes.shape
    single = (codes.long().unsqueeze(-1) >> torch.arange(bits) & 1).flatten(1)
    padded = torch.nn.functional.pad(single, (0, -(count * bits) % 32)).view(rows, -1, 32)
    return (padded << torch.arange(32)).sum(-1).to(torch.int32)


class Made:
    """A random weight in groups, and what it means."""

    def __init__(
        self, columns: int, size: int, bits: int, *, is_reordered: bool = False, has_zero: bool = True
    ) -> None:
        generator = torch.Generator().manual_seed(columns * bits)
        self.index = torch.arange(columns) // size
        if is_reordered:
            self.index = self.index[torch.randperm(columns, generator=generator)]
        groups = -(-columns // size)
        self.codes = torch.randint(0, 1 << bits, (ROWS, columns), generator=generator)
        self.scale = (torch.rand((ROWS, groups), generator=generator) + 0.5).half()
        # Version 1 of GPTQ cannot say 0 for certain.
        self.zero = torch.full((ROWS, groups), 1 << (bits - 1))
        if has_zero:
            self.zero = torch.randint(1, 1 << bits, (ROWS, groups), generator=generator)
        self.values = (self.codes - self.zero[:, self.index]).float() * self.scale.float()[:, self.index]

    def gptq(self, bits: int, *, with_index: bool) -> dict[str, Tensor]:
        tensors = {
            "qweight": stream(self.codes, bits).t(),
            "qzeros": stream(self.zero.t() - 1, bits),
            "scales": self.scale.t(),
        }
        return {**tensors, "g_idx": self.index.int()} if with_index else tensors

    def awq(self) -> dict[str, Tensor]:
        def words(values: Tensor) -> Tensor:
            ordered = values.unflatten(1, (-1, 8))[:, :, AWQ_ORDER]
            return (ordered << (4 * torch.arange(8))).sum(-1).to(torch.int32)

        return {"qweight": words(self.codes.t()), "qzeros": words(self.zero.t()), "scales": self.scale.t()}

    def packed(self, bits: int) -> dict[str, Tensor]:
        tensors = {
            "weight_packed": stream(self.codes, bits),
            "weight_scale": self.scale,
            "weight_zero_point": stream(self.zero.t(), bits).t(),
            "weight_shape": torch.tensor(list(self.codes.shape)),
        }
        in_order = torch.equal(self.index, self.index.sort().values)
        return tensors if in_order else {**tensors, "weight_g_idx": self.index.int()}


def load(folder: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> PackedWeight:
    write_checkpoint(folder, [(f"x.{suffix}", tensor.contiguous()) for suffix, tensor in tensors.items()])
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    source = Source.open("test", str(folder))
    return source.load(source.weights["x.weight"])


def check(packed: PackedWeight, made: Made, *, is_compiled: bool) -> None:
    assert torch.equal(packed.dequantize(), made.values)
    if not extension.is_available():
        return
    prepared = panels.prepare(packed)
    assert isinstance(prepared, panels.PanelWeight) == is_compiled
    if is_compiled:
        x = torch.randn(3, packed.shape[1])
        assert torch.equal(products.linear(x, prepared), products.linear(x, panels.prepare(dense(made.values))))


@pytest.mark.parametrize("order", ["none", "given", "changed"])
@pytest.mark.parametrize(
    ("columns", "size", "bits"),  # GPTQ's columns are whole words
    [(*sizes, bits) for sizes in SIZES for bits in (2, 3, 4, 8) if sizes[0] * bits % 32 == 0],
    ids=str,
)
def test_gptq(columns: int, size: int, bits: int, order: str, tmp_path: Path) -> None:
    made = Made(columns, size, bits, is_reordered=order == "changed")
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": False, "desc_act": order == "changed"}
    packed = load(tmp_path, made.gptq(bits, with_index=order != "none"), config)
    # A group that takes all inputs is one of any size, in any order.
    has_kernel = columns % 8 == 0 and (bits < 8 or order != "changed")
    check(packed, made, is_compiled=has_kernel or size >= columns)


@pytest.mark.parametrize(("columns", "size"), SIZES, ids=str)
def test_symmetric_gptq_of_8_bits(columns: int, size: int, tmp_path: Path) -> None:
    made = Made(columns, size, 8, has_zero=False)
    config = {"quant_method": "gptq", "bits": 8, "group_size": size, "sym": True}
    check(load(tmp_path, made.gptq(8, with_index=False), config), made, is_compiled=columns % 8 == 0)


@pytest.mark.parametrize(("columns", "size"), SIZES, ids=str)
def test_awq(columns: int, size: int, tmp_path: Path) -> None:
    made = Made(columns, size, 4)
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "zero_point": True}
    check(load(tmp_path, made.awq(), config), made, is_compiled=columns % 8 == 0)


@pytest.mark.parametrize("is_reordered", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("columns", "size"), SIZES, ids=str)
def test_compressed_tensors(columns: int, size: int, bits: int, is_reordered: bool, tmp_path: Path) -> None:
    made = Made(columns, size, bits, is_reordered=is_reordered)
    arguments = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": size, "symmetric": False}
    if is_reordered:
        arguments["actorder"] = "group"
    packed = load(tmp_path, made.packed(bits), ct("pack-quantized", **arguments))
    has_kernel = columns % 8 == 0 and (bits < 8 or not is_reordered)
    check(packed, made, is_compiled=has_kernel or size >= columns)


def test_an_index_that_leaves_groups_empty(tmp_path: Path) -> None:
    """GPTQ with an order of activations may put inputs as it likes: here all but 8 into one group of three."""
    made = Made(64, 24, 4)
    made.index = torch.where(torch.arange(64) < 8, 2, 0)
    made.values = (made.codes - made.zero[:, made.index]).float() * made.scale.float()[:, made.index]
    config = {"quant_method": "gptq", "bits": 4, "group_size": 24, "sym": False, "desc_act": True}
    check(load(tmp_path, made.gptq(4, with_index=True), config), made, is_compiled=True)


def test_a_number_of_groups_that_no_size_makes_is_refused(tmp_path: Path) -> None:
    """The error names the size that the tensors have room for."""
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
    with raises(CheckpointError, "x.weight", "1 × 64", "1 × 100"):
        load(tmp_path, Made(200, 128, 4).gptq(4, with_index=False), config)
    with raises(CheckpointError, "x.weight", 3, 128, 67):
        load(tmp_path / "b", Made(200, 72, 4).gptq(4, with_index=False), {**config, "group_size": 128})


@pytest.mark.parametrize(("columns", "works"), [(192, ("64", "32")), (160, ("32", "16")), (200, ("8",))])
def test_quantizing_names_a_size_that_works(columns: int, works: tuple[str, ...]) -> None:
    int4 = writable_format("int4")
    with raises(ConfigError, columns, *works):
        int4.grid((8, columns), torch.bfloat16, QuantizeOptions(group_size=128))
    for size in works:
        assert int4.grid((8, columns), torch.bfloat16, QuantizeOptions(group_size=int(size))).block == (1, int(size))
    assert columns % int4.grid((8, columns), torch.bfloat16).block[1] == 0
    with raises(ConfigError, "int8"):
        int4.grid((8, 100), torch.bfloat16)
    assert writable_format("int8").grid((8, 100), torch.bfloat16)
