"""8-bit weights with scales: fp8 (E4M3) and int8, per tensor, per output channel, per group or per block.

Published as compressed-tensors `float-quantized` and `int-quantized` (`weight`, `weight_scale`) and as DeepSeek's and
Qwen's fp8 (`weight`, `weight_scale_inv`, which despite its name multiplies). `value × scale` is the weight. Activation
scales may be present and are not used: activations stay wide.

fp8 values: OCP E4M3 without infinities, largest 448. Scales are made as compressed-tensors makes them:
amax / 448 for fp8, amax / 127.5 for int8 (rounded half to even, clamped to -128..127).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amalgam.checkpoint.store import TensorEntry
from amalgam.errors import CheckpointError, ConfigError
from amalgam.kernels.packed import PackedWeight
from amalgam.kernels.reference import unpack_scaled8
from amalgam.precision.format import (
    WEIGHT_SUFFIX,
    Quantized,
    QuantizeOptions,
    Read,
    Scheme,
    StoredWeight,
    WeightFormat,
    expect_dtype,
)

SCALE_NAMES = ("weight_scale", "weight_scale_inv")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_BLOCK = (128, 128)


class Scaled8(WeightFormat):
    """8-bit values times scales."""

    can_quantize = True
    optional = frozenset({*SCALE_NAMES, "input_scale"})

    def __init__(self, name: str, dtype: torch.dtype, largest: float, divisor: float, scales: tuple[str, ...]) -> None:
        self.name = name
        self.dtype = dtype
        self.scales = scales
        self._largest = largest
        self._divisor = divisor

    def recognise(
        self, name: str, parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any]
    ) -> StoredWeight | None:
        weight = parts[WEIGHT_SUFFIX]
        if weight.dtype != self.dtype:
            return None
        scales = [suffix for suffix in SCALE_NAMES if suffix in parts]
        if len(scales) != 1 or len(weight.shape) != 2:
            raise CheckpointError(
                f"Weight {name!r} has type {self.name} and shape {list(weight.shape)} with scales {scales} "
                f"in {weight.file.name}.",
                remedy="Expected two dimensions and exactly one of weight_scale, weight_scale_inv.",
            )
        scale = parts[scales[0]]
        expect_dtype(name, scale, SCALE_DTYPES)
        block = _block(name, weight.shape, scale, _declared_block(quantization))
        return StoredWeight(name, self, weight.shape, parts, block)

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        assert stored.block is not None
        scale = next(read(stored.parts[suffix]) for suffix in SCALE_NAMES if suffix in stored.parts)
        grid = _scale_grid(stored.shape, stored.block)
        return self._packed(
            read(stored.parts[WEIGHT_SUFFIX]).clone(), scale.float().reshape(grid).clone(), stored.block
        )

    def pack(self, quantized: Quantized, shape: tuple[int, ...]) -> PackedWeight:
        scale = quantized.tensors["weight_scale"].float()
        return self._packed(
            quantized.tensors[WEIGHT_SUFFIX], scale.reshape(_scale_grid(shape, quantized.block)), quantized.block
        )

    def _packed(self, weight: Tensor, scale: Tensor, block: tuple[int, int]) -> PackedWeight:
        return PackedWeight("scaled8", tuple(weight.shape), {"weight": weight, "scale": scale}, unpack_scaled8, block)

    def quantize(self, weight: Tensor, options: QuantizeOptions) -> Quantized:
        block = self._block_of(tuple(weight.shape), options)
        rows, columns = weight.shape
        wide = weight.float()
        padded = torch.nn.functional.pad(wide, (0, -columns % block[1], 0, -rows % block[0]))
        tiles = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
        scale = tiles.abs().amax(dim=(1, 3)) / self._divisor
        scale = scale.masked_fill(scale == 0, torch.finfo(torch.float32).eps)
        scaled = tiles / scale[:, None, :, None]
        if self.dtype == torch.int8:
            scaled = scaled.round()
        values = scaled.clamp(-self._largest - (self.dtype == torch.int8), self._largest).to(self.dtype)
        values = values.view(padded.shape)[:rows, :columns].contiguous()
        stored_scale = scale.reshape(1) if options.scale == "tensor" else scale
        return Quantized({WEIGHT_SUFFIX: values, "weight_scale": stored_scale}, block)

    def scheme(self, quantized: Quantized, options: QuantizeOptions) -> Scheme:
        strategy = self._scale(options)
        arguments: dict[str, Any] = {
            "num_bits": 8,
            "type": "float" if self.dtype.is_floating_point else "int",
            "symmetric": True,
            "strategy": strategy,
            "dynamic": False,
        }
        if strategy == "block":
            arguments["block_structure"] = list(FP8_BLOCK)
        return Scheme("float-quantized" if self.dtype.is_floating_point else "int-quantized", arguments)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        return math.prod(shape) + 4 * math.prod(_scale_grid(shape, self._block_of(shape, options)))

    def _scale(self, options: QuantizeOptions) -> str:
        scale = options.scale or "channel"
        if scale not in self.scales:
            raise ConfigError(
                f"Format {self.name} has no scale per {scale!r}.", remedy=f"Allowed: {', '.join(self.scales)}."
            )
        if options.group_size is not None:
            raise ConfigError(
                f"group_size {options.group_size} does not apply to format {self.name}.", remedy="Leave it out."
            )
        return scale

    def _block_of(self, shape: tuple[int, ...], options: QuantizeOptions) -> tuple[int, int]:
        choice = self._scale(options)
        return {"tensor": (shape[0], shape[1]), "channel": (1, shape[1]), "block": FP8_BLOCK}[choice]


def _scale_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _declared_block(quantization: Mapping[str, Any]) -> tuple[int, int] | None:
    """The block size that the checkpoint declares: the shapes alone cannot tell it at ragged edges."""
    declared = quantization.get("weight_block_size")
    if declared is None:
        for group in (quantization.get("config_groups") or {}).values():
            declared = declared or ((group or {}).get("weights") or {}).get("block_structure")
    if isinstance(declared, str):
        declared = [int(part) for part in declared.lower().split("x") if part.isdigit()]
    if not isinstance(declared, list) or len(declared) != 2:
        return None
    return int(declared[0]), int(declared[1])


def _block(name: str, shape: tuple[int, ...], scale: TensorEntry, declared: tuple[int, int] | None) -> tuple[int, int]:
    """Which weights share a scale, from the scale's shape."""
    rows, columns = shape
    if math.prod(scale.shape) == 1:
        return rows, columns
    if scale.shape in ((rows,), (rows, 1)):
        return 1, columns
    if declared is not None and scale.shape == _scale_grid(shape, declared):
        return declared
    if len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and columns % scale.shape[1] == 0:
        return 1, columns // scale.shape[1]
    raise CheckpointError(
        f"Scale {scale.name!r} of weight {name!r} has shape {list(scale.shape)} in {scale.file.name}.",
        remedy=f"A weight of shape {list(shape)} takes one scale, one per row, one per group of columns, "
        f"or one per block of the declared size ({declared or 'none declared'}).",
    )


FORMATS = (
    Scaled8("fp8", torch.float8_e4m3fn, 448.0, 448.0, ("tensor", "channel", "block")),
    Scaled8("int8", torch.int8, 127.0, 127.5, ("channel",)),
)
