"""MXFP4 (OCP Microscaling 1.0): 4-bit floating point (E2M1) in groups of 32 that share a power of two (E8M0).

    weight_packed  uint8 [out, in / 2]   input 2k in the low nibble of byte k
    weight_scale   uint8 [out, in / 32]  b means 2^(b - 127); 255 is NaN

compressed-tensors publishes it so (`mxfp4-pack-quantized`). gpt-oss's `*_blocks` and `*_scales` are the same bytes for
all experts of a layer; `amalgam.formats.fused` cuts them into these parts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from amalgam.errors import ConfigError
from amalgam.formats.common.scales import E8M0, MX_GROUP, powers
from amalgam.formats.contract import (
    ACTIVATION_SUFFIXES,
    ModuleContext,
    Read,
    Scheme,
    StoredWeight,
    WritableFormat,
    expect_dtype,
    expect_shape,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import Codes, Encoded, Grid, QuantizeOptions
from amalgam.kernels.layouts import E2M1, TABLE4, pack_nibbles
from amalgam.kernels.weights import PackedWeight

# 2^(b - 127) × 6, the largest value of a group, is still finite in float32.
_LARGEST = 252
# The least number of scales that a group's largest magnitude is: compressed-tensors' rounding of scales. Up to 7 of
# them, those above 6 are clipped.
_REACH = 3.5


class Mxfp4(WritableFormat):
    """E2M1 with E8M0 scales."""

    layouts = (TABLE4,)
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
        if len(packed.shape) != 2 or 0 in packed.shape or packed.shape[1] * 2 % MX_GROUP:
            refuse_part(name, packed, f"Expected [out, in / 2] with a multiple of {MX_GROUP} inputs.")
        rows, columns = packed.shape[0], packed.shape[1] * 2
        expect_shape(name, scale, (rows, columns // MX_GROUP))
        return StoredWeight(name, self, (rows, columns), parts, (1, MX_GROUP), 4)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return 1 if role in self.required else 0

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        parts = {
            "weight": owned(read(stored.parts["weight_packed"])),
            "scale": powers(stored, "weight_scale", read(stored.parts["weight_scale"]), _LARGEST),
            "table": torch.tensor(E2M1),
        }
        return PackedWeight(TABLE4, stored.shape, parts, stored.block)

    def grid(self, shape: tuple[int, ...], dtype: torch.dtype, options: QuantizeOptions = QuantizeOptions()) -> Grid:
        _check_options(self.name, options)
        rows, columns = shape
        if columns % MX_GROUP:
            raise ConfigError(
                f"{self.name} needs a multiple of {MX_GROUP} inputs; this weight has {columns}.",
                remedy="Choose int8 or fp8, which take any number.",
            )
        largest = E2M1[len(E2M1) // 2 - 1]
        return Grid(
            shape=(rows, columns),
            block=(1, MX_GROUP),
            strategy="group",
            dtype=torch.float8_e4m3fn,  # which has all values of E2M1
            low=-largest,
            high=largest,
            reach=_REACH,
            scale_dtype=torch.float8_e8m0fnu,
            half_levels=E2M1[: len(E2M1) // 2],
        )

    def encode(self, codes: Codes) -> Encoded:
        values = codes.values.float()
        index = torch.bucketize(values.abs(), torch.tensor(E2M1[: len(E2M1) // 2])).to(torch.uint8)
        packed = pack_nibbles(index | (torch.signbit(values).to(torch.uint8) << 3))
        return Encoded(codes.grid, {"weight_packed": packed, "weight_scale": codes.scale.view(torch.uint8)})

    def pack(self, encoded: Encoded) -> PackedWeight:
        parts = {
            "weight": encoded.tensors["weight_packed"],
            "scale": encoded.tensors["weight_scale"].view(torch.float8_e8m0fnu),
            "table": torch.tensor(E2M1),
        }
        return PackedWeight(TABLE4, encoded.grid.shape, parts, encoded.grid.block)

    def scheme(self, grid: Grid) -> Scheme:
        arguments = {
            "num_bits": self.bits,
            "type": "float",
            "symmetric": True,
            "strategy": grid.strategy,
            "group_size": MX_GROUP,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
            "zp_dtype": "torch.uint8",
        }
        return Scheme("mxfp4-pack-quantized", arguments)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        _check_options(self.name, options)
        rows, columns = shape
        return rows * columns // 2 + rows * -(-columns // MX_GROUP) + 64


def _check_options(name: str, options: QuantizeOptions) -> None:
    if options.group_size not in (None, MX_GROUP) or options.scale not in (None, "group") or options.has_zero_points:
        raise ConfigError(
            f"Format {name} always has groups of {MX_GROUP} inputs and no zero points.",
            remedy="Leave group size, scale and zero points out.",
        )


FORMAT = Mxfp4()
