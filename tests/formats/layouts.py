"""Random weights in every published layout: any bits are a weight, so no quantizer is needed.

`LAYOUTS`: name → `Layout`, whose `make(rows, columns)` gives the tensors of one weight by suffix. Rows and columns must
be multiples of 32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amalgam.formats.contract import WeightFormat
from amalgam.formats.registry import all_formats

Tensors = dict[str, Tensor]
GROUP = 32
_NF4 = (-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626)


@dataclass(frozen=True)
class Layout:
    """One published layout.

    Attributes:
        format: name of the format that must recognise it.
        quantization: what config.json declares.
        make: (rows, columns) → suffix → tensor.
        scales: suffixes of scales, which must be finite.
    """

    format: str
    quantization: dict[str, Any]
    make: Callable[[int, int], Tensors]
    scales: tuple[str, ...] = ()
    grouped: tuple[str, ...] = field(default=())  # scales with one column (or row) per group
    index: str | None = None


def words(rows: int, columns: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, (rows, columns), dtype=torch.int64).to(torch.int32)


def octets(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def scale(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape) * 0.02 + 0.01).to(dtype)


def fp8(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).to(torch.float8_e4m3fn)


def e5m2(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns).to(torch.float8_e5m2)


def int8(rows: int, columns: int) -> Tensor:
    return octets(rows, columns).view(torch.int8)


def powers(*shape: int) -> Tensor:
    return torch.randint(118, 124, shape, dtype=torch.uint8)


def ct(layout: str, **arguments: Any) -> dict[str, Any]:
    weights = {"symmetric": True, "dynamic": False, **arguments}
    group = {"targets": ["Linear"], "weights": weights, "format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def packed(bits: int, *, asymmetric: str = "", ordered: bool = True, whole: bool = False) -> Layout:
    """compressed-tensors `pack-quantized`; `whole`: 3 bits as version 0.17 packed them."""

    def width(count: int) -> int:
        return -(-count // (32 // bits)) if whole else -(-count * bits // 32)

    def make(rows: int, columns: int) -> Tensors:
        groups = columns // GROUP
        tensors = {
            "weight_packed": words(rows, width(columns)),
            "weight_scale": scale(rows, groups, dtype=torch.bfloat16),
            "weight_shape": torch.tensor([rows, columns]),
        }
        if asymmetric == "packed":
            tensors["weight_zero_point"] = words(width(rows), groups)
        if asymmetric == "int8":
            tensors["weight_zero_point"] = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, groups)).char()
        if not ordered:
            tensors["weight_g_idx"] = (torch.randperm(columns) // GROUP).int()
        return tensors

    arguments = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": not asymmetric}
    name = "int8-packed" if bits == 8 else f"int{bits}"
    index = None if ordered else "weight_g_idx"
    return Layout(name, ct("pack-quantized", **arguments), make, ("weight_scale",), ("weight_scale",), index)


def gptq(bits: int, version: str, *, symmetric: bool, ordered: bool = True, method: str = "gptq") -> Layout:
    def make(rows: int, columns: int) -> Tensors:
        groups = columns // GROUP
        middle = (1 << (bits - 1)) - (version == "gptq")
        bytes_of_zeros = sum(middle << (bits * i) for i in range(32 // bits)) if bits != 3 else 0
        zeros = torch.full((groups, rows * bits // 32), bytes_of_zeros, dtype=torch.int64).to(torch.int32)
        if not symmetric or bits == 3:  # bytes below 0x6d hold no field of all ones, which version 1 cannot mean
            zeros = (words(groups, rows * bits // 32) & 0x24924924) if bits == 3 else words(*zeros.shape) & 0x55555555
        tensors = {
            "qweight": words(columns * bits // 32, rows),
            "qzeros": zeros,
            "scales": scale(groups, rows, dtype=torch.float16),
        }
        if not ordered:
            tensors["g_idx"] = (torch.randperm(columns) // GROUP).int()
        return tensors

    config = {"quant_method": method, "bits": bits, "group_size": GROUP, "sym": symmetric and bits != 3}
    if method == "gptq":
        config |= {"checkpoint_format": version, "desc_act": not ordered}
    else:
        config["packing_format"] = "auto_round:auto_gptq" if version == "gptq" else "auto_round"
    return Layout(f"gptq-int{bits}", config, make, ("scales",), ("scales",), None if ordered else "g_idx")


def awq(method: str) -> Layout:
    def make(rows: int, columns: int) -> Tensors:
        groups = columns // GROUP
        return {
            "qweight": words(columns, rows // 8),
            "qzeros": words(groups, rows // 8),
            "scales": scale(groups, rows, dtype=torch.float16),
        }

    config: dict[str, Any] = {"quant_method": method, "bits": 4, "group_size": GROUP}
    config |= {"zero_point": True} if method == "awq" else {"packing_format": "auto_round:auto_awq", "sym": False}
    return Layout("awq-int4", config, make, ("scales",), ("scales",))


def bnb4(kind: str, *, nested: bool = False) -> Layout:
    def make(rows: int, columns: int) -> Tensors:
        blocks = rows * columns // 64
        state = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
        tensors = {"weight": octets(rows * columns // 2, 1), "weight.quant_map": torch.tensor([*_NF4, 0.7230, 1.0])}
        if nested:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
            tensors["weight.absmax"] = octets(blocks)
            tensors["weight.nested_absmax"] = scale(-(-blocks // 256))
            tensors["weight.nested_quant_map"] = torch.linspace(-1, 1, 256)
        else:
            tensors["weight.absmax"] = scale(blocks)
        raw = bytearray(json.dumps(state).encode())
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = torch.frombuffer(raw, dtype=torch.uint8).clone()
        return tensors

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    scales = ("weight.nested_absmax", "weight.nested_quant_map") if nested else ("weight.absmax",)
    return Layout(f"bnb-{kind}", config, make, (*scales, "weight.quant_map"))


def hqq(bits: int, axis: int) -> Layout:
    packing, per_word = {8: ("8bit_u8", 1), 4: ("4bit_u8", 2), 3: ("3bit_32", 10), 2: ("2bit_u8", 4)}[bits]

    def make(rows: int, columns: int) -> Tensors:
        groups = rows * columns // GROUP
        shape = (groups, GROUP) if axis else (GROUP, groups)
        packed_rows = -(-shape[0] // per_word)
        values = words(packed_rows, shape[1]) & 0x3FFFFFFF if bits == 3 else octets(packed_rows, shape[1])
        ends = (groups, 1) if axis else (1, groups)
        return {
            "W_q": values,
            "scale": scale(*ends),
            "zero": torch.rand(ends) * ((1 << bits) - 1),
            "shape": torch.tensor([rows, columns]),
            "axis": torch.tensor(axis, dtype=torch.int32),
            "nbits": torch.tensor(bits, dtype=torch.int32),
            "group_size": torch.tensor(GROUP, dtype=torch.int32),
            "packing": torch.tensor([ord(c) for c in packing], dtype=torch.uint8),
            "view_as_float": torch.tensor(0, dtype=torch.uint8),
        }

    settings = {"weight_quant_params": {"nbits": bits, "group_size": GROUP, "axis": axis}}
    return Layout("hqq", {"quant_method": "hqq", "quant_config": settings}, make, ("scale", "zero"))


def aqlm(books: int, bits: int, rows_of: int, columns_of: int) -> Layout:
    def make(rows: int, columns: int) -> Tensors:
        half = 1 << bits - 1
        codes = torch.randint(-half, half, (rows // rows_of, columns // columns_of, books))
        return {
            "codes": codes.to(torch.int8 if bits <= 8 else torch.int16),
            "codebooks": (torch.randn(books, 2 * half, rows_of, columns_of) * 0.5).half(),
            "scales": scale(rows // rows_of, 1, 1, 1, dtype=torch.float16),
        }

    config = {"quant_method": "aqlm", "num_codebooks": books, "nbits_per_codebook": bits}
    config |= {"out_group_size": rows_of, "in_group_size": columns_of, "linear_weights_not_to_quantize": []}
    return Layout("aqlm", config, make, ("scales", "codebooks"))


def scaled(
    name: str, config: dict[str, Any], values: Callable[[int, int], Tensor], suffix: str, *shape: Any, **more: Any
) -> Layout:
    """`shape`: functions of (rows, columns), one per dimension of the scale."""

    def make(rows: int, columns: int) -> Tensors:
        sizes = tuple(size(rows, columns) for size in shape)
        tensors = {"weight": values(rows, columns), suffix: scale(*sizes, dtype=more.get("dtype", torch.float32))}
        if more.get("zero"):
            tensors["weight_zero_point"] = torch.randint(-128, 128, sizes).char()
        return tensors

    return Layout(name, config, make, (suffix,))


def plain(name: str, dtype: torch.dtype) -> Layout:
    return Layout(name, {}, lambda rows, columns: {"weight": (torch.randn(rows, columns) * 0.1).to(dtype)})


def _nvfp4(values: str, whole: str, shape: tuple[int, ...]) -> Callable[[int, int], Tensors]:
    def make(rows: int, columns: int) -> Tensors:
        return {
            values: octets(rows, columns // 2),
            "weight_scale": (torch.rand(rows, columns // 16) + 0.5).to(torch.float8_e4m3fn),
            whole: torch.full(shape, 20.0 if whole == "weight_global_scale" else 0.05),
        }

    return make


def _modelopt_int4(rows: int, columns: int) -> Tensors:
    weight = {"weight": octets(rows // 2, columns), "weight_scale": scale(rows, columns // GROUP)}
    return {**weight, "pre_quant_scale": torch.rand(columns) + 0.5}


def _rows(rows: int, columns: int) -> int:
    return rows


def _one(rows: int, columns: int) -> int:
    return 1


def _blocks(rows: int, columns: int) -> int:
    return rows // 32


def _block_columns(rows: int, columns: int) -> int:
    return columns // 32


_FP8 = {"num_bits": 8, "type": "float"}
_INT8 = {"num_bits": 8, "type": "int"}
_FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
LAYOUTS = {
    "fp32": plain("fp32", torch.float32),
    "bf16": plain("bf16", torch.bfloat16),
    "fp16": plain("fp16", torch.float16),
    "fp8-tensor": scaled("fp8", ct("float-quantized", **_FP8, strategy="tensor"), fp8, "weight_scale", _one),
    "fp8-channel": scaled("fp8", ct("float-quantized", **_FP8, strategy="channel"), fp8, "weight_scale", _rows, _one),
    "fp8-e5m2": scaled("fp8-e5m2", ct("float-quantized-e5m2", **_FP8, strategy="tensor"), e5m2, "weight_scale", _one),
    "fp8-block": scaled("fp8", _FP8_BLOCKS, fp8, "weight_scale_inv", _blocks, _block_columns),
    "fp8-scalar": scaled("fp8", {"quant_method": "fp8", "activation_scheme": "static"}, fp8, "weight_scale_inv"),
    "fp8-powers": scaled(
        "fp8",
        {**_FP8_BLOCKS, "scale_fmt": "ue8m0"},
        fp8,
        "weight_scale_inv",
        _blocks,
        _block_columns,
        dtype=torch.float8_e8m0fnu,
    ),
    "fbgemm": scaled("fp8", {"quant_method": "fbgemm_fp8"}, fp8, "weight_scale", _rows, _one),
    "modelopt-fp8": scaled("fp8", {"quant_method": "modelopt", "quant_algo": "FP8"}, fp8, "weight_scale"),
    "mxfp8": Layout(
        "mxfp8",
        ct("mxfp8-quantized", **_FP8, strategy="group", group_size=32),
        lambda rows, columns: {"weight": fp8(rows, columns), "weight_scale": powers(rows, columns // 32)},
        ("weight_scale",),
    ),
    "int8-channel": scaled("int8", ct("int-quantized", **_INT8, strategy="channel"), int8, "weight_scale", _rows, _one),
    "int8-zero-point": scaled(
        "int8",
        ct("int-quantized", **_INT8, strategy="channel", symmetric=False),
        int8,
        "weight_scale",
        _rows,
        _one,
        zero=True,
    ),
    "int2": packed(2),
    "int3": packed(3, asymmetric="packed"),
    "int3-whole-words": packed(3, asymmetric="packed", whole=True),
    "int4": packed(4),
    "int4-asymmetric": packed(4, asymmetric="packed"),
    "int4-unpacked-zeros": packed(4, asymmetric="int8"),
    "int4-unordered": packed(4, asymmetric="packed", ordered=False),
    "int8-packed": packed(8),
    "int8-packed-asymmetric": packed(8, asymmetric="packed"),
    "gptq-int2": gptq(2, "gptq_v2", symmetric=False),
    "gptq-int3": gptq(3, "gptq", symmetric=False),
    "gptq-int4": gptq(4, "gptq", symmetric=True),
    "gptq-int4-unordered": gptq(4, "gptq_v2", symmetric=False, ordered=False),
    "gptq-int8": gptq(8, "gptq", symmetric=True),
    "gptq-int8-unordered": gptq(8, "gptq", symmetric=True, ordered=False),
    "autoround": gptq(4, "gptq_v2", symmetric=False, method="auto-round"),
    "autoround-awq": awq("auto-round"),
    "awq": awq("awq"),
    "bnb-nf4": bnb4("nf4"),
    "bnb-nf4-nested": bnb4("nf4", nested=True),
    "bnb-fp4": bnb4("fp4"),
    "bnb-int8": Layout(
        "bnb-int8",
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        lambda rows, columns: {
            "weight": int8(rows, columns),
            "SCB": scale(rows),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        },
        ("SCB",),
    ),
    "hqq-int2": hqq(2, 1),
    "hqq-int3": hqq(3, 1),
    "hqq-int4": hqq(4, 1),
    "hqq-int4-cyclic": hqq(4, 0),
    "hqq-int8": hqq(8, 1),
    "aqlm-blocks": aqlm(1, 9, 2, 8),
    "aqlm": aqlm(2, 8, 1, 8),
    "nvfp4": Layout(
        "nvfp4",
        ct("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
        _nvfp4("weight_packed", "weight_global_scale", (1,)),
        ("weight_scale", "weight_global_scale"),
    ),
    "modelopt-nvfp4": Layout(
        "modelopt-nvfp4",
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        _nvfp4("weight", "weight_scale_2", ()),
        ("weight_scale", "weight_scale_2"),
    ),
    "modelopt-int4": Layout(
        "modelopt-int4",
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": GROUP},
        _modelopt_int4,
        ("weight_scale", "pre_quant_scale"),
        ("weight_scale",),
    ),
    "mxfp4": Layout(
        "mxfp4",
        ct("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
        lambda rows, columns: {
            "weight_packed": octets(rows, columns // 2),
            "weight_scale": powers(rows, columns // 32),
        },
        ("weight_scale",),
    ),
}


def get_format(name: str) -> WeightFormat:
    """The format called `name`."""
    return next(weight_format for weight_format in all_formats() if weight_format.name == name)
