"""4-bit integers as ModelOpt publishes them (`W4A16_AWQ`), two output rows in one byte.

    weight           uint8 [out / 2, in]         byte r: row 2r in the low nibble, 2r + 1 in the high one, signed
    weight_scale     float [out, in / group]
    pre_quant_scale  float [in]                  multiplies the inputs; absent where it was folded into a norm

`w[o, i] = nibble × weight_scale[o, i // group] × pre_quant_scale[i]`. ModelOpt's other layouts are those of
compressed-tensors under its own declaration: see scaled8, mxfp8 and nvfp4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amalgam.formats.common.integers import Groups, from_codes
from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ACTIVATION_SUFFIXES,
    WEIGHT_SUFFIX,
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
from amalgam.kernels.layouts import INT4, scale_columns
from amalgam.kernels.weights import PackedWeight


class ModelOptInt4(WeightFormat):
    """ModelOpt's int4 with AWQ scales."""

    layouts = (INT4,)
    name = "modelopt-int4"
    required = frozenset({WEIGHT_SUFFIX, "weight_scale"})
    optional = frozenset({"pre_quant_scale", *ACTIVATION_SUFFIXES})
    methods = frozenset({"modelopt"})
    number = "int"
    bits = 4

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        weight, scale = parts[WEIGHT_SUFFIX], parts["weight_scale"]
        if weight.dtype != torch.uint8 or context.declared.layout != "W4A16_AWQ":
            return None
        expect_dtype(name, scale, SCALE_DTYPES)
        if len(weight.shape) != 2 or 0 in weight.shape or len(scale.shape) != 2:
            refuse_part(name, weight, "Expected [out / 2, in] beside scales of two dimensions.")
        rows, columns = weight.shape[0] * 2, weight.shape[1]
        groups = scale.shape[1]
        if scale.shape[0] != rows or groups == 0 or columns % groups:
            refuse_part(name, scale, f"Expected [{rows}, groups] with a number of groups that divides {columns}.")
        if "pre_quant_scale" in parts:
            expect_dtype(name, parts["pre_quant_scale"], SCALE_DTYPES)
            expect_shape(name, parts["pre_quant_scale"], (columns,))
        return StoredWeight(name, self, (rows, columns), parts, (1, columns // groups), 4)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return {WEIGHT_SUFFIX: 2, "weight_scale": 1}.get(role, 0)

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        stacked = read(stored.parts[WEIGHT_SUFFIX])
        codes = torch.stack((stacked & 15, stacked >> 4), dim=1).flatten(0, 1) ^ 8  # signed value + 8
        scale = owned(finite(stored, "weight_scale", read(stored.parts["weight_scale"])))
        packed = from_codes(codes, 4, Groups(scale))
        if "pre_quant_scale" not in stored.parts:
            return packed
        columns = finite(stored, "pre_quant_scale", read(stored.parts["pre_quant_scale"]))
        return scale_columns(packed, owned(columns))

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns // 2 + 2 * rows * -(-columns // (options.group_size or 128)) + 4 * columns


FORMAT = ModelOptInt4()
