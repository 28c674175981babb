"""Integers of 2, 3, 4 and 8 bits in groups, as compressed-tensors publishes them (`pack-quantized`: W4A16, W8A16, …).

    weight_packed      int32 [out, ceil(in × bits / 32)]   each row one stream of bits, low bits first
    weight_scale       float [out, groups], [out, 1] or [1]
    weight_zero_point  int32 [ceil(out × bits / 32), groups], packed along the rows; before 0.9.4 int8 [out, groups];
                       absent when symmetric
    weight_g_idx       int32 [in]                          group of each input; absent when inputs are in order
    weight_shape       int64 [2]                           (out, in); a row may end before its last word

Stored code = signed value + 2^(bits - 1), zero points too. Up to version 0.17 three bits were packed 10 to a word, with
two bits unused; the width tells. With 4 bits, a little-endian machine finds the runtime layout of `kernels.layouts` in
the words' bytes: input 2k in the low nibble of byte k. Source: compressed_tensors/compressors/pack_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amalgam.errors import CheckpointError, ConfigError
from amalgam.formats.common.integers import (
    WIDTHS,
    Groups,
    from_codes,
    from_nibbles,
    group_index,
    pack_words,
    unpack_whole,
    unpack_words,
)
from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ACTIVATION_SUFFIXES,
    ONLY_OF_ALL,
    ModuleContext,
    Read,
    Scheme,
    StoredWeight,
    WritableFormat,
    expect_dtype,
    expect_index,
    expect_shape,
    finite,
    group_block,
    group_size_of,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import Codes, Encoded, Grid, QuantizeOptions
from amalgam.kernels.layouts import AFFINE8, INT4, SCALED8
from amalgam.kernels.weights import PackedWeight

_PER_WORD = 8


class PackedInt(WritableFormat):
    """compressed-tensors `pack-quantized` with a number of bits."""

    layouts = (INT4, SCALED8, AFFINE8)

    required = frozenset({"weight_packed", "weight_scale", "weight_shape"})
    optional = frozenset({"weight_zero_point", "weight_g_idx", *ACTIVATION_SUFFIXES})
    methods = frozenset({"compressed-tensors", "auto-round"})
    number = "int"
    bits: int

    def __init__(self, name: str, bits: int) -> None:
        self.name = name
        self.bits = bits

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        packed, scale, shape = parts["weight_packed"], parts["weight_scale"], parts["weight_shape"]
        if packed.dtype != torch.int32:
            return None
        expect_dtype(name, shape, (torch.int64, torch.int32))
        expect_shape(name, shape, (2,))
        expect_dtype(name, scale, SCALE_DTYPES)
        if len(packed.shape) != 2 or (scale.shape not in ((1,), ()) and len(scale.shape) != 2):
            refuse_part(name, packed, f"Expected [out, in × {self.bits} / 32] beside scales of two dimensions.")
        bits = context.declared.bits
        if bits is None:
            bits = _bits_by_shape(name, packed, context.read(shape))
        if bits not in WIDTHS:
            raise CheckpointError(
                f"Weight {name!r} is packed with {bits} bits by the declaration in {context.declared.where}.",
                remedy=f"Supported: {', '.join(map(str, WIDTHS))}.",
            )
        if bits != self.bits:
            return None
        rows = packed.shape[0]
        groups = scale.shape[1] if len(scale.shape) == 2 else 1
        if len(scale.shape) == 2 and scale.shape[0] != rows:
            refuse_part(name, scale, f"Expected [{rows}, groups].")
        columns = self._columns(name, packed, groups, context, shape)
        block = (1, columns) if groups == 1 else group_block(name, scale, columns, groups, context.declared)
        expect_index(name, "weight_g_idx", parts, groups, context.declared)
        if packed.shape[1] not in (_width(columns, bits), -(-columns // (32 // bits))):
            refuse_part(name, packed, f"{columns} inputs of {bits} bits take {_width(columns, bits)} words in a row.")
        if "weight_zero_point" in parts:
            zero = parts["weight_zero_point"]
            expect_dtype(name, zero, (torch.int32, torch.int8))
            heights = (_width(rows, bits), -(-rows // (32 // bits))) if zero.dtype == torch.int32 else (rows,)
            if zero.shape not in [(height, groups) for height in heights]:
                refuse_part(name, zero, f"Expected [{heights[0]}, {groups}].")
        if "weight_g_idx" in parts:
            expect_dtype(name, parts["weight_g_idx"], (torch.int32, torch.int64))
            expect_shape(name, parts["weight_g_idx"], (columns,))
        if len(scale.shape) != 2 and rows > 1:
            block = (rows, columns)
        return StoredWeight(name, self, (rows, columns), parts, block, bits)

    def _columns(self, name: str, packed: TensorPart, groups: int, context: ModuleContext, shape: TensorPart) -> int:
        """Inputs of a row. Headers tell where whole groups are declared; else the shape tensor must be read."""
        size = context.declared.group_size
        if context.declared.strategy == "group" and size is not None and size > 0 and groups > 1:
            columns = groups * size
            if packed.shape[1] in (_width(columns, self.bits), -(-columns // (32 // self.bits))):
                return columns
        rows, columns = (int(value) for value in context.read(shape).tolist())
        if rows != packed.shape[0] or columns < 1:
            refuse_part(name, packed, f"{shape.name} says [{rows}, {columns}].")
        return columns

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        if role == "weight_shape":
            return ONLY_OF_ALL
        if role == "weight_packed":
            return 1
        if role == "weight_scale":
            return 1 if len(stored.parts[role].shape) == 2 else 0
        if role == "weight_zero_point" and stored.parts[role].dtype == torch.int32:
            return None if 32 % self.bits else 32 // self.bits
        return 1 if role == "weight_zero_point" else 0

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        shape = stored.parts.get("weight_shape")
        declared = stored.shape if shape is None else tuple(read(shape).tolist())
        if declared != stored.shape:
            raise CheckpointError(
                f"Weight {stored.name!r} declares shape {list(declared)} in {stored.parts['weight_shape'].name}.",
                remedy=f"Its packed tensor and scales have room for {list(stored.shape)}.",
            )
        tensors = {role: read(entry) for role, entry in stored.parts.items()}
        finite(stored, "weight_scale", tensors["weight_scale"])
        assert stored.block is not None
        return self._packed(stored.name, tensors, (stored.shape[0], stored.shape[1]), stored.block[1])

    def _packed(self, name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int], size: int) -> PackedWeight:
        rows, columns = shape
        words, scale = tensors["weight_packed"], owned(tensors["weight_scale"])
        scale = scale if scale.dim() == 2 else owned(scale.reshape(1, 1).expand(rows, 1))
        groups = Groups(scale, size=size)
        if "weight_zero_point" in tensors:
            groups = groups._replace(zero=self._zero(tensors["weight_zero_point"], rows))
        if "weight_g_idx" in tensors:
            group = group_index(name, "weight_g_idx", tensors["weight_g_idx"], scale.shape[1], size)
            groups = groups._replace(group=group)
        if self.bits == 4 and columns % _PER_WORD == 0:
            nibbles = owned(words.contiguous().view(torch.uint8))
            return from_nibbles(nibbles, shape, groups)
        return from_codes(owned(self._codes(words, columns)[:, :columns]), self.bits, groups)

    def _codes(self, words: Tensor, count: int) -> Tensor:
        """Codes `[rows, at least count]`; the width tells the two packings of 3 bits apart."""
        is_dense = words.shape[1] == _width(count, self.bits)
        return unpack_words(words, self.bits) if is_dense else unpack_whole(words, self.bits)

    def _zero(self, stored: Tensor, rows: int) -> Tensor:
        if stored.dtype == torch.int8:
            return stored.short() + (1 << (self.bits - 1))
        return self._codes(stored.t(), rows)[:, :rows].t().short()

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        # 2 and 3 bits take the room of 4 in memory, unless a backend keeps them: see `formats.common.integers`.
        values = rows * columns if self.bits == 8 else -(-rows * columns // 2)
        groups = rows * -(-columns // _group_size(self.name, columns, options))
        return values + (3 if options.has_zero_points else 2) * groups

    def grid(self, shape: tuple[int, ...], dtype: torch.dtype, options: QuantizeOptions = QuantizeOptions()) -> Grid:
        rows, columns = shape
        if columns % _PER_WORD:
            raise ConfigError(
                f"{self.name} needs a multiple of {_PER_WORD} inputs; this weight has {columns}.",
                remedy="Choose int8 or fp8, which take any number.",
            )
        half = 1 << (self.bits - 1)
        return Grid(
            shape=(rows, columns),
            block=(1, _group_size(self.name, columns, options)),
            strategy="channel" if options.scale == "channel" else "group",
            dtype=torch.int8,
            low=-half,
            high=half - 1,
            reach=half - 0.5,
            scale_dtype=dtype if dtype in SCALE_DTYPES else torch.float32,
            has_zero=options.has_zero_points,
        )

    def encode(self, codes: Codes) -> Encoded:
        tensors = {
            "weight_packed": pack_words(self._raised(codes.values), self.bits),
            "weight_scale": codes.scale,
            "weight_shape": torch.tensor(codes.grid.shape, dtype=torch.int64),
        }
        if codes.zero is not None:
            packed = pack_words(self._raised(codes.zero).t().contiguous(), self.bits)
            tensors["weight_zero_point"] = packed.t().contiguous()
        return Encoded(codes.grid, tensors)

    def _raised(self, signed: Tensor) -> Tensor:
        """Signed codes, int8, as they are stored: modulo 256 the sum is the same without signs."""
        return signed.view(torch.uint8) + (1 << (self.bits - 1))

    def pack(self, encoded: Encoded) -> PackedWeight:
        return self._packed("", encoded.tensors, encoded.grid.shape, encoded.grid.block[1])

    def scheme(self, grid: Grid) -> Scheme:
        arguments: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": not grid.has_zero,
            "strategy": grid.strategy,
            "dynamic": False,
        }
        if grid.strategy == "group":
            arguments["group_size"] = grid.block[1]
        return Scheme("pack-quantized", arguments)


def _group_size(name: str, columns: int, options: QuantizeOptions) -> int:
    if options.scale not in (None, "group", "channel"):
        raise ConfigError(f"Format {name} has no scale per {options.scale!r}.", remedy="Allowed: group, channel.")
    if options.scale == "channel":
        if options.group_size is not None:
            raise ConfigError(
                f"group_size {options.group_size} does not apply to scales per channel.", remedy="Give one of the two."
            )
        return columns
    return group_size_of(columns, options.group_size)


def _width(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _bits_by_shape(name: str, packed: TensorPart, shape: Tensor) -> int:
    """The width of a value where no config declares it: the one that fits the words."""
    columns = int(shape[1])
    fitting = [bits for bits in WIDTHS if packed.shape[1] == _width(columns, bits)]
    if len(fitting) != 1:
        refuse_part(name, packed, f"Its {columns} inputs fit {fitting or 'no'} bits: declare num_bits in config.json.")
    return fitting[0]


FORMATS = (PackedInt("int4", 4), PackedInt("int2", 2), PackedInt("int3", 3), PackedInt("int8-packed", 8))
