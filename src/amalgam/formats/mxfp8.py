"""MXFP8 (OCP Microscaling 1.0): fp8 (E4M3) in groups of 32 that share a power of two (E8M0).

    weight        E4M3  [out, in]
    weight_scale  uint8 [out, in / 32]  b means 2^(b - 127); 255 is NaN

compressed-tensors (`mxfp8-quantized`) and ModelOpt (`MXFP8`) publish it so.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amalgam.formats.common.scales import E8M0, MX_GROUP, powers
from amalgam.formats.contract import (
    ACTIVATION_SUFFIXES,
    WEIGHT_SUFFIX,
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
    expect_shape,
    owned,
    refuse_part,
)
from amalgam.formats.declared.values import Declared
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import SCALED8
from amalgam.kernels.weights import PackedWeight

# 2^(b - 127) × 448 is still finite in float32.
_LARGEST = 246


class Mxfp8(WeightFormat):
    """E4M3 with E8M0 scales per 32 inputs."""

    layouts = (SCALED8,)
    name = "mxfp8"
    required = frozenset({WEIGHT_SUFFIX, "weight_scale"})
    optional = ACTIVATION_SUFFIXES
    methods = frozenset({"compressed-tensors", "modelopt", "auto-round"})
    number = "float"
    bits = 8

    def is_possible(self, declared: Declared) -> bool:
        return (
            super().is_possible(declared)
            and declared.group_size in (None, MX_GROUP)
            and declared.strategy in (None, "group")
        )

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        weight, scale = parts[WEIGHT_SUFFIX], parts["weight_scale"]
        if weight.dtype != torch.float8_e4m3fn or scale.dtype not in E8M0 or context.declared.method == "fp8":
            return None
        if len(weight.shape) != 2 or 0 in weight.shape or weight.shape[1] % MX_GROUP:
            refuse_part(name, weight, f"Expected [out, in] with a multiple of {MX_GROUP} inputs.")
        rows, columns = weight.shape
        expect_shape(name, scale, (rows, columns // MX_GROUP))
        return StoredWeight(name, self, (rows, columns), parts, (1, MX_GROUP), 8)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return 1 if role in self.required else 0

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        scale = powers(stored, "weight_scale", read(stored.parts["weight_scale"]), _LARGEST)
        parts = {"weight": owned(read(stored.parts[WEIGHT_SUFFIX])), "scale": scale}
        return PackedWeight(SCALED8, stored.shape, parts, stored.block)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns + rows * -(-columns // MX_GROUP)


FORMAT = Mxfp8()
