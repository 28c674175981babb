"""8-bit weights with scales: fp8 (E4M3) and int8, per tensor, per output channel, per group or per block.

Published as compressed-tensors `float-quantized` and `int-quantized`, by ModelOpt, fbgemm and AutoFP8 (`weight`,
`weight_scale`), and as DeepSeek's and Qwen's fp8 (`weight`, `weight_scale_inv`, which despite its name multiplies;
GPTQModel's, of the same name, divides, which only its declaration says).
`(value - weight_zero_point) × scale` is the weight; only compressed-tensors' int8 has zero points. ModelOpt's
`pre_quant_scale` multiplies the inputs. Scales of activations are not used: activations stay wide.

fp8 values: OCP E4M3 without infinities, largest 448, and E5M2, largest 57344. compressed-tensors has no word for E5M2
and would take its bits for E4M3: what is made here says `float-quantized-e5m2`, which it refuses. Scales are made as
compressed-tensors makes them: amax / 448 for E4M3, amax / 127.5 for int8 (rounded half to even, clamped to -128..127).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amalgam.errors import CheckpointError, ConfigError
from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ACTIVATION_SUFFIXES,
    ROWS_SHARE,
    WEIGHT_SUFFIX,
    ModuleContext,
    Read,
    Scheme,
    StoredWeight,
    WritableFormat,
    expect_dtype,
    expect_shape,
    finite,
    group_size_of,
    owned,
    refuse_part,
)
from amalgam.formats.declared.values import Declared
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import Codes, Encoded, Grid, QuantizeOptions, num_blocks
from amalgam.kernels.layouts import AFFINE8, SCALED8, scale_columns
from amalgam.kernels.weights import PackedWeight

SCALE_NAMES = ("weight_scale", "weight_scale_inv")
FP8_BLOCK = (128, 128)


class Scaled8(WritableFormat):
    """8-bit values times scales."""

    layouts = (SCALED8, AFFINE8)
    bits = 8
    optional = frozenset({*SCALE_NAMES, "weight_zero_point", "pre_quant_scale", *ACTIVATION_SUFFIXES})

    def __init__(
        self, name: str, dtype: torch.dtype, limits: tuple[float, float], reach: float, scales: tuple[str, ...]
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.scales = scales
        self.number = "float" if dtype.is_floating_point else "int"
        self.methods = frozenset({"compressed-tensors", "modelopt", "auto-round"})
        if dtype.is_floating_point:
            self.methods |= {"fp8", "fbgemm_fp8"}
        self._low, self._high = limits
        self._reach = reach

    def is_possible(self, declared: Declared) -> bool:
        is_mx = declared.layout in ("mxfp8-quantized", "MXFP8")
        return super().is_possible(declared) and not is_mx

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        weight = parts[WEIGHT_SUFFIX]
        if weight.dtype != self.dtype:
            return None
        scales = [suffix for suffix in SCALE_NAMES if suffix in parts]
        if len(scales) != 1 or len(weight.shape) != 2 or 0 in weight.shape:
            raise CheckpointError(
                f"Weight {name!r} has type {self.name} and shape {list(weight.shape)} with scales {scales} "
                f"in {weight.file.name}.",
                remedy="Expected two dimensions and exactly one of weight_scale, weight_scale_inv.",
            )
        scale = parts[scales[0]]
        powers = (torch.float8_e8m0fnu, *((torch.uint8,) if context.declared.layout == "ue8m0" else ()))
        expect_dtype(name, scale, SCALE_DTYPES + (powers if self.number == "float" else ()))
        block = _block(name, (weight.shape[0], weight.shape[1]), scale, context.declared)
        if "weight_zero_point" in parts:
            zero = parts["weight_zero_point"]
            if self.number == "float" or block[0] not in (1, weight.shape[0]):
                refuse_part(name, zero, "Only int8 per tensor, channel or group has zero points.")
            expect_dtype(name, zero, (torch.int8,))
            expect_shape(name, zero, scale.shape)
        if "pre_quant_scale" in parts:
            expect_dtype(name, parts["pre_quant_scale"], SCALE_DTYPES)
            expect_shape(name, parts["pre_quant_scale"], (weight.shape[1],))
        return StoredWeight(name, self, weight.shape, parts, block, 8)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        if role == WEIGHT_SUFFIX:
            return 1
        assert stored.block is not None
        if role not in (*SCALE_NAMES, "weight_zero_point") or stored.block[0] >= stored.shape[0]:
            return 0
        return 1 if stored.block[0] == 1 else ROWS_SHARE

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        assert stored.block is not None
        role = next(suffix for suffix in SCALE_NAMES if suffix in stored.parts)
        scale = read(stored.parts[role])
        if scale.dtype == torch.uint8:
            scale = scale.view(torch.float8_e8m0fnu)
        scale = finite(stored, role, owned(scale.float()).reshape(num_blocks(stored.shape, stored.block)))
        if stored.declared.divides_by_scale:
            scale = finite(stored, role, 1.0 / scale)  # a stored 0 is infinite then
        weight = owned(read(stored.parts[WEIGHT_SUFFIX]))
        if "weight_zero_point" in stored.parts:
            zero = read(stored.parts["weight_zero_point"]).float().reshape(scale.shape)
            packed = _asymmetric(weight, scale, zero, stored.block)
        else:
            packed = self._packed(weight, scale, stored.block)
        if "pre_quant_scale" in stored.parts:
            columns = finite(stored, "pre_quant_scale", read(stored.parts["pre_quant_scale"]))
            return scale_columns(packed, owned(columns))
        return packed

    def pack(self, encoded: Encoded) -> PackedWeight:
        scale = encoded.tensors["weight_scale"].float().reshape(encoded.grid.scale_shape)
        if encoded.grid.has_zero:
            zero = encoded.tensors["weight_zero_point"].float().reshape(scale.shape)
            return _asymmetric(encoded.tensors[WEIGHT_SUFFIX], scale, zero, encoded.grid.block)
        return self._packed(encoded.tensors[WEIGHT_SUFFIX], scale, encoded.grid.block)

    def _packed(self, weight: Tensor, scale: Tensor, block: tuple[int, int]) -> PackedWeight:
        return PackedWeight(SCALED8, tuple(weight.shape), {"weight": weight, "scale": scale}, block)

    def grid(self, shape: tuple[int, ...], dtype: torch.dtype, options: QuantizeOptions = QuantizeOptions()) -> Grid:
        return Grid(
            shape=(shape[0], shape[1]),
            block=self._block_of(shape, options),
            strategy=self._strategy(options),
            dtype=self.dtype,
            low=self._low,
            high=self._high,
            reach=self._reach,
            scale_dtype=torch.float32,
            has_zero=options.has_zero_points,
        )

    def encode(self, codes: Codes) -> Encoded:
        tensors = {WEIGHT_SUFFIX: codes.values, "weight_scale": codes.scale}
        if codes.zero is not None:
            tensors["weight_zero_point"] = codes.zero
        if codes.grid.strategy == "tensor":
            tensors |= {suffix: part.reshape(1) for suffix, part in tensors.items() if suffix != WEIGHT_SUFFIX}
        return Encoded(codes.grid, tensors)

    def scheme(self, grid: Grid) -> Scheme:
        arguments: dict[str, Any] = {
            "num_bits": 8,
            "type": self.number,
            "symmetric": not grid.has_zero,
            "strategy": grid.strategy,
            "dynamic": False,
        }
        if grid.strategy == "block":
            arguments["block_structure"] = list(grid.block)
        if grid.strategy == "group":
            arguments["group_size"] = grid.block[1]
        flavor = "-e5m2" if self.dtype is torch.float8_e5m2 else ""
        return Scheme(f"{self.number}-quantized{flavor}", arguments)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        each = 8 if options.has_zero_points else 4
        return math.prod(shape) + each * math.prod(num_blocks(shape, self._block_of(shape, options)))

    def _strategy(self, options: QuantizeOptions) -> str:
        scale = options.scale or ("channel" if options.group_size is None else "group")
        if scale not in self.scales:
            raise ConfigError(
                f"Format {self.name} has no scale per {scale!r}.", remedy=f"Allowed: {', '.join(self.scales)}."
            )
        if options.group_size is not None and scale != "group":
            raise ConfigError(
                f"group_size {options.group_size} does not apply to scales per {scale}.", remedy="Leave it out."
            )
        if options.has_zero_points and self.number == "float":
            raise ConfigError(f"Format {self.name} has no zero points.", remedy="Leave them out, or choose int8.")
        return scale

    def _block_of(self, shape: tuple[int, ...], options: QuantizeOptions) -> tuple[int, int]:
        strategy = self._strategy(options)
        if strategy == "group":
            return 1, group_size_of(shape[1], options.group_size)
        return {"tensor": (shape[0], shape[1]), "channel": (1, shape[1]), "block": FP8_BLOCK}[strategy]


def _asymmetric(weight: Tensor, scale: Tensor, zero: Tensor, block: tuple[int, int]) -> PackedWeight:
    """int8 with zero points: bytes and zero points both raised by 128."""
    rows = weight.shape[0]
    parts = {
        "weight": (weight.view(torch.uint8) ^ 128),
        "scale": owned(scale.expand(rows, -1)),
        "zero": owned((zero + 128).expand(rows, -1)),
    }
    return PackedWeight(AFFINE8, tuple(weight.shape), parts, (1, block[1]))


def _block(name: str, shape: tuple[int, int], scale: TensorPart, declared: Declared) -> tuple[int, int]:
    """Which weights share a scale: as declared, else told by the scale's shape."""
    expected = declared.block_of(shape)
    block = _block_of_shape(shape, scale.shape, expected)
    if block is None:
        wanted = "one scale, one per row, or one per group of columns (blocks need a declaration)"
        if expected is not None:
            wanted = f"a scale per {expected[0]} × {expected[1]} weights, as declared"
        refuse_part(name, scale, f"A weight of shape {list(shape)} takes {wanted}.")
    return block


def _block_of_shape(
    shape: tuple[int, int], found: tuple[int, ...], expected: tuple[int, int] | None
) -> tuple[int, int] | None:
    rows, columns = shape
    if len(found) == 4 and found[1] == found[3] == 1:  # ModelOpt's blocks
        found = (found[0], found[2])
    if expected is not None:
        grid = num_blocks(shape, expected)
        if found == grid or (math.prod(found) == math.prod(grid) and (1 in grid and len(found) < 2)):
            return expected
    elif math.prod(found) == 1:
        return rows, columns
    elif found in ((rows,), (rows, 1)):
        return 1, columns
    elif len(found) == 2 and found[0] == rows and found[1] > 0 and columns % found[1] == 0:
        return 1, columns // found[1]
    return None


FORMATS = (
    Scaled8("fp8", torch.float8_e4m3fn, (-448.0, 448.0), 448.0, ("tensor", "channel", "block")),
    Scaled8("fp8-e5m2", torch.float8_e5m2, (-57344.0, 57344.0), 57344.0, ("tensor", "channel", "block")),
    Scaled8("int8", torch.int8, (-128.0, 127.0), 127.5, ("tensor", "channel", "group")),
)
