"""NVFP4: 4-bit floating point (E2M1) in groups of 16 with an E4M3 scale each and one float32 scale for the tensor.

    compressed-tensors          ModelOpt
    weight_packed               weight          uint8 [out, in / 2]   input 2k in the low nibble of byte k
    weight_scale                weight_scale    E4M3  [out, in / 16]
    weight_global_scale         weight_scale_2  float32 [1] or []
    w = E2M1 × (scale / global) w = E2M1 × (scale × scale_2)

ModelOpt's AWQ variants add `pre_quant_scale [in]`, which multiplies the inputs. Scales of activations are not used:
activations stay wide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ACTIVATION_SUFFIXES,
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    expect_shape,
    finite,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import E2M1, TABLE4, scale_columns
from amalgam.kernels.weights import PackedWeight

_FLOAT8 = torch.float8_e4m3fn


class Nvfp4(WeightFormat):
    """NVFP4 under one tool's names."""

    layouts = (TABLE4,)

    number = "float"
    bits = 4

    def __init__(self, name: str, values: str, whole: str, operation: str, methods: frozenset[str]) -> None:
        self.name = name
        self.methods = methods
        self._values = values
        self._whole = whole
        self._operation = operation
        self.required = frozenset({values, "weight_scale", whole})
        extra = {"pre_quant_scale"} if operation == "factor" else set()
        self.optional = ACTIVATION_SUFFIXES | extra

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        values, scale, whole = parts[self._values], parts["weight_scale"], parts[self._whole]
        expect_dtype(name, values, (torch.uint8,))
        expect_dtype(name, scale, (_FLOAT8,))
        expect_dtype(name, whole, (torch.float32,))
        if len(values.shape) != 2 or 0 in values.shape:
            refuse_part(name, values, "Expected [out, in / 2].")
        if math.prod(whole.shape) != 1:
            refuse_part(name, whole, "Expected one element.")
        rows, columns = values.shape[0], values.shape[1] * 2
        # ModelOpt's W4A8 variant takes groups of 32; both tools write the size that the declaration names.
        group = context.declared.group_size or 16
        if columns % group:
            refuse_part(name, values, f"Expected a multiple of {group} inputs.")
        expect_shape(name, scale, (rows, columns // group))
        if "pre_quant_scale" in parts:
            expect_dtype(name, parts["pre_quant_scale"], SCALE_DTYPES)
            expect_shape(name, parts["pre_quant_scale"], (columns,))
        return StoredWeight(name, self, (rows, columns), parts, (1, group), 4)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return 1 if role in (self._values, "weight_scale") else 0

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        whole = owned(finite(stored, self._whole, read(stored.parts[self._whole])).reshape(()))
        if self._operation == "divisor" and float(whole) == 0:
            refuse_part(stored.name, stored.parts[self._whole], "It is 0, and scales are divided by it.")
        parts = {
            "weight": owned(read(stored.parts[self._values])),
            "scale": owned(finite(stored, "weight_scale", read(stored.parts["weight_scale"]))),
            "table": torch.tensor(E2M1),
            self._operation: whole,
        }
        packed = PackedWeight(TABLE4, stored.shape, parts, stored.block)
        if "pre_quant_scale" in stored.parts:
            columns = finite(stored, "pre_quant_scale", read(stored.parts["pre_quant_scale"]))
            return scale_columns(packed, owned(columns))
        return packed

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns // 2 + rows * -(-columns // 16) + 68


FORMATS = (
    Nvfp4(
        "nvfp4",
        "weight_packed",
        "weight_global_scale",
        "divisor",
        frozenset({"compressed-tensors", "auto-round"}),
    ),
    Nvfp4("modelopt-nvfp4", "weight", "weight_scale_2", "factor", frozenset({"modelopt"})),
)
