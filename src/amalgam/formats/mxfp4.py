"""MXFP4 (OCP Microscaling 1.0): 4-bit floating point (E2M1) in groups of 32 that share a power of two (E8M0).

    weight_packed  uint8 [out, in / 2]   input 2k in the low nibble of byte k
    weight_scale   uint8 [out, in / 32]  b means 2^(b - 127); 255 is NaN

compressed-tensors publishes it so (`mxfp4-pack-quantized`). gpt-oss's `*_blocks` and `*_scales` are the same bytes for
all experts of a layer; `amalgam.formats.fused` cuts them into these parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amalgam.errors import CheckpointError
from amalgam.formats.contract import (
    ACTIVATION_SUFFIXES,
    ModuleContext,
    QuantizeOptions,
    Read,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    expect_shape,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.kernels.layouts import E2M1, unpack_table4
from amalgam.kernels.packed import PackedWeight

GROUP = 32
E8M0 = (torch.uint8, torch.float8_e8m0fnu)
# 2^(b - 127) × 6, the largest value of a group, is still finite in float32.
_LARGEST = 252


class Mxfp4(WeightFormat):
    """E2M1 with E8M0 scales."""

    layouts = ("table4",)
    name = "mxfp4"
    required = frozenset({"weight_packed", "weight_scale"})
    optional = ACTIVATION_SUFFIXES
    methods = frozenset({"compressed-tensors", "auto-round", "mxfp4"})
    number = "float"
    bits = 4

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        if packed.dtype != torch.uint8:
            return None
        expect_dtype(name, scale, E8M0)
        if len(packed.shape) != 2 or 0 in packed.shape or packed.shape[1] * 2 % GROUP:
            refuse_part(name, packed, f"Expected [out, in / 2] with a multiple of {GROUP} inputs.")
        rows, columns = packed.shape[0], packed.shape[1] * 2
        expect_shape(name, scale, (rows, columns // GROUP))
        return StoredWeight(name, self, (rows, columns), parts, (1, GROUP), 4)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return 1 if role in self.required else 0

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        parts = {
            "weight": owned(read(stored.parts["weight_packed"])),
            "scale": powers(stored, "weight_scale", read(stored.parts["weight_scale"]), _LARGEST),
            "table": torch.tensor(E2M1),
        }
        return PackedWeight("table4", stored.shape, parts, unpack_table4, stored.block)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns // 2 + rows * -(-columns // GROUP) + 64


def powers(stored: StoredWeight, role: str, tensor: Tensor, largest: int) -> Tensor:
    """E8M0 scales as float8_e8m0fnu.

    Raises:
        CheckpointError: one is NaN (255), or its weights would not be finite.
    """
    raw = owned(tensor.view(torch.uint8))
    if raw.numel() and int(raw.max()) > largest:
        raise CheckpointError(
            f"Tensor {stored.parts[role].name!r} of weight {stored.name!r} holds the scale 2^{int(raw.max()) - 127}"
            f"{', which is NaN' if int(raw.max()) == 255 else ''}, in {stored.parts[role].file.name}.",
            remedy=f"Largest that is finite in float32: 2^{largest - 127}. The file is damaged: download it again.",
        )
    return raw.view(torch.float8_e8m0fnu)


FORMAT = Mxfp4()
