"""4-bit integers in groups, as compressed-tensors publishes them (`pack-quantized`, W4A16).

    weight_packed      int32 [out, ceil(in / 8)]      input i of a row: word i // 8, bits 4 (i % 8) ..
    weight_scale       float [out, in / group_size]
    weight_zero_point  int32 [ceil(out / 8), groups]  packed along the rows; absent when symmetric
    weight_g_idx       int32 [in]                     group of each input; absent when inputs are in order
    weight_shape       int64 [2]                      (out, in)

Stored nibble = signed value + 8. On a little-endian machine the words' bytes already are the runtime layout of
`kernels.packed`: input 2k in the low nibble of byte k.
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
from amalgam.kernels.reference import pack_nibbles, unpack_int4, unpack_nibbles
from amalgam.precision.format import (
    Quantized,
    QuantizeOptions,
    Read,
    Scheme,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    expect_shape,
)
from amalgam.precision.formats.scaled8 import SCALE_DTYPES

DEFAULT_GROUP_SIZE = 128
_PER_WORD = 8


class Int4(WeightFormat):
    """compressed-tensors `pack-quantized` with 4 bits."""

    name = "int4"
    can_quantize = True
    required = frozenset({"weight_packed", "weight_scale", "weight_shape"})
    optional = frozenset({"weight_zero_point", "weight_g_idx", "input_scale"})

    def recognise(
        self, name: str, parts: Mapping[str, TensorEntry], quantization: Mapping[str, Any]
    ) -> StoredWeight | None:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        if packed.dtype != torch.int32:
            return None
        for entry, dtypes in ((parts["weight_shape"], (torch.int64, torch.int32)), (scale, SCALE_DTYPES)):
            expect_dtype(name, entry, dtypes)
        expect_shape(name, parts["weight_shape"], (2,))
        # The shape tensor is data; headers alone give the shape when a row fills its words, as in every linear layer
        # whose width is a multiple of 8. `load` checks it against the data.
        if len(packed.shape) != 2 or len(scale.shape) != 2 or packed.shape[0] != scale.shape[0]:
            raise CheckpointError(
                f"Weight {name!r} has packed shape {list(packed.shape)} and scale shape {list(scale.shape)} "
                f"in {packed.file.name}.",
                remedy="Expected [out, in / 8] and [out, groups].",
            )
        rows, columns, groups = packed.shape[0], packed.shape[1] * _PER_WORD, scale.shape[1]
        declared = _declared_bits(quantization)
        if declared not in (None, 4):
            raise CheckpointError(
                f"Weight {name!r} is packed with {declared} bits by the declaration in config.json.",
                remedy="This format holds 4 bits.",
            )
        if groups == 0 or columns % groups:
            raise CheckpointError(
                f"Weight {name!r} has {groups} groups for {columns} inputs in {packed.file.name}.",
                remedy="The number of inputs must be a multiple of the number of groups.",
            )
        if "weight_zero_point" in parts:
            expect_dtype(name, parts["weight_zero_point"], (torch.int32,))
            expect_shape(name, parts["weight_zero_point"], (-(-rows // _PER_WORD), groups))
        if "weight_g_idx" in parts:
            expect_dtype(name, parts["weight_g_idx"], (torch.int32,))
            expect_shape(name, parts["weight_g_idx"], (columns,))
        return StoredWeight(name, self, (rows, columns), parts, (1, columns // groups))

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        declared = tuple(read(stored.parts["weight_shape"]).tolist())
        if declared != stored.shape:
            raise CheckpointError(
                f"Weight {stored.name!r} declares shape {list(declared)} in {stored.parts['weight_shape'].name}.",
                remedy=f"Its packed tensor has shape {list(stored.shape)}; rows that do not fill whole words of 8 "
                "are not supported.",
            )
        tensors = {role: read(entry) for role, entry in stored.parts.items()}
        assert stored.block is not None
        return self._packed(tensors, stored.shape, stored.block)

    def pack(self, quantized: Quantized, shape: tuple[int, ...]) -> PackedWeight:
        return self._packed(quantized.tensors, shape, quantized.block)

    def _packed(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], block: tuple[int, int]) -> PackedWeight:
        parts = {
            "weight": tensors["weight_packed"].contiguous().view(torch.uint8).clone(),
            "scale": tensors["weight_scale"].clone(),
        }
        groups = shape[1] // block[1]
        if "weight_zero_point" in tensors:
            words = tensors["weight_zero_point"].t().contiguous().view(torch.uint8)
            parts["zero"] = unpack_nibbles(words)[:, : shape[0]].t().contiguous()
        if "weight_g_idx" in tensors:
            index = tensors["weight_g_idx"].clone()
            if index.numel() and not (0 <= int(index.min()) and int(index.max()) < groups):
                raise CheckpointError(
                    f"weight_g_idx holds {int(index.min())}..{int(index.max())}.", remedy=f"Allowed: 0..{groups - 1}."
                )
            parts["group"] = index
        return PackedWeight("int4", shape, parts, unpack_int4, block)

    def quantize(self, weight: Tensor, options: QuantizeOptions) -> Quantized:
        rows, columns = weight.shape
        if columns % _PER_WORD:
            raise ConfigError(f"int4 needs a multiple of {_PER_WORD} inputs; this weight has {columns}.")
        group = self._group_size(columns, options)
        grouped = weight.float().view(rows, columns // group, group)
        # Rounded to the stored type first, so that the values are the best for the scale that is read back.
        dtype = weight.dtype if weight.dtype in SCALE_DTYPES else torch.float32
        scale = (grouped.abs().amax(-1) / 7.5).to(dtype)
        scale = scale.masked_fill(scale == 0, torch.finfo(dtype).eps)
        values = (grouped / scale.float().unsqueeze(-1)).round().clamp(-8, 7) + 8
        packed = pack_nibbles(values.to(torch.uint8).view(rows, columns)).view(torch.int32)
        shape = torch.tensor([rows, columns], dtype=torch.int64)
        return Quantized({"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}, (1, group))

    def scheme(self, quantized: Quantized, options: QuantizeOptions) -> Scheme:
        arguments = {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": quantized.block[1],
            "dynamic": False,
        }
        return Scheme("pack-quantized", arguments)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns // 2 + 2 * rows * (columns // self._group_size(columns, options))

    def _group_size(self, columns: int, options: QuantizeOptions) -> int:
        if options.scale is not None:
            raise ConfigError(f"scale {options.scale!r} does not apply to int4.", remedy="Set group_size instead.")
        # Without a wish: the default, or the largest power of two below it that divides.
        group = options.group_size or math.gcd(columns, DEFAULT_GROUP_SIZE)
        if columns % group:
            raise ConfigError(
                f"group_size {group} does not divide the {columns} inputs of this weight.",
                remedy="Choose a divisor, a power of two for instance.",
            )
        return group


def _declared_bits(quantization: Mapping[str, Any]) -> int | None:
    """The one width that all groups declare, or None if they differ (then the tensors decide)."""
    groups = (quantization.get("config_groups") or {}).values()
    widths = {((group or {}).get("weights") or {}).get("num_bits") for group in groups}
    return widths.pop() if len(widths) == 1 else None


FORMAT = Int4()
