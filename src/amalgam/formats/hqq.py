"""HQQ (Badri & Shaji 2023): floating zero points, 1 to 8 bits, groups along the inputs or along everything else.

    W_q          uint8 (3 bits: int32), rows of a matrix M side by side in one word, see `_PACKINGS`
    scale, zero  float, one per group
    shape        [2] = (out, in); axis, nbits: integers; packing: the name of the packing as ASCII codes

axis 1: M is `[groups, group_size]`; axis 0: M is `[group_size, groups]`. `w = ((M - zero) × scale).reshape(shape)`.
Source: hqq/core/quantize.py and bitpack.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from amalgam.formats.common.integers import Groups, from_codes
from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    finite,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import AFFINE4, AFFINE8, CYCLIC4, CYCLIC8, INT4, SCALED8, pack_nibbles
from amalgam.kernels.weights import PackedWeight

# Name → (type of a word, bits of a value, values in a word). The first block of rows has the highest bits.
_PACKINGS = {
    "8bit_u8": (torch.uint8, 8, 1),
    "4bit_u8": (torch.uint8, 4, 2),
    "3bit_32": (torch.int32, 3, 10),
    "2bit_u8": (torch.uint8, 2, 4),
    "1bit_u8": (torch.uint8, 1, 8),
}
_SMALL_BYTES = 256
# Settings of the quantizer and of HQQ's own kernels that say nothing about the stored values.
_IRRELEVANT = frozenset(
    {"group_size", "compute_dtype", "channel_wise", "optimize", "round_zero", "offload_meta"}
    | {"encoded_state_dict", "stores_quant_config", "unpack_view_dtype"}
)


class Hqq(WeightFormat):
    """HQQ with unquantized scales and zero points."""

    layouts = (INT4, SCALED8, AFFINE4, AFFINE8, CYCLIC4, CYCLIC8)
    name = "hqq"
    anchor = "W_q"
    required = frozenset({"W_q", "scale", "zero", "shape", "axis", "nbits", "packing"})
    optional = _IRRELEVANT | {"view_as_float", "quant_scale", "quant_zero"}
    methods = frozenset({"hqq"})

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        def small(role: str) -> list[int]:
            part = parts[role]
            if part.dtype.is_floating_point or part.nbytes > _SMALL_BYTES:
                refuse_part(name, part, f"Expected integers, at most {_SMALL_BYTES} bytes.")
            return [int(value) for value in context.read(part).reshape(-1).tolist()]

        shape, axis, bits = small("shape"), small("axis"), small("nbits")
        packing = _text(small("packing"))
        if len(shape) != 2 or not all(0 < size < 2**31 for size in shape):
            refuse_part(name, parts["shape"], f"It says {shape}; expected [out, in].")
        if axis not in ([0], [1]) or packing not in _PACKINGS or len(bits) != 1:
            refuse_part(
                name, parts["W_q"], f"axis is {axis}, packing {packing!r}: expected 0 or 1, and {', '.join(_PACKINGS)}."
            )
        for role in ("quant_scale", "quant_zero"):
            if role in parts and small(role) != [0]:
                refuse_part(name, parts[role], "Quantized scales and zero points are not served.")
        dtype, width, per_word = _PACKINGS[packing]
        is_view = "view_as_float" in parts and small("view_as_float") != [0]
        if not is_view:
            expect_dtype(name, parts["W_q"], (dtype,))
        count = math.prod(shape)
        groups = math.prod(parts["scale"].shape)
        for role in ("scale", "zero"):
            expect_dtype(name, parts[role], SCALE_DTYPES)
            if math.prod(parts[role].shape) != groups:
                refuse_part(name, parts[role], f"Expected {groups} elements, as many as scales.")
        if groups == 0 or count % groups:
            refuse_part(name, parts["scale"], f"The number of groups must divide the {count} elements.")
        rows, columns = (groups, count // groups) if axis == [1] else (count // groups, groups)
        words = -(-rows // per_word) * columns
        if parts["W_q"].nbytes != words * dtype.itemsize:
            refuse_part(
                name, parts["W_q"], f"{rows} × {columns} values in {packing} take {words * dtype.itemsize} bytes."
            )
        if bits[0] != width and not (width == 8 and bits[0] in (5, 6)):
            refuse_part(name, parts["nbits"], f"It says {bits[0]} beside packing {packing!r}.")
        block = (1, math.gcd(count // groups, shape[1])) if axis == [1] else None
        return StoredWeight(name, self, (shape[0], shape[1]), parts, block, bits[0])

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        rows, columns = stored.shape
        scale = owned(finite(stored, "scale", read(stored.parts["scale"]))).flatten()
        zero = owned(finite(stored, "zero", read(stored.parts["zero"]))).flatten()
        codes = self._codes(stored, read, rows * columns, scale.numel()).view(rows, columns)
        is_narrow = int(codes.max()) < 16 and columns % 2 == 0
        if stored.block is None:
            layout = CYCLIC4 if is_narrow else CYCLIC8
        else:
            per_group = stored.block[1]
            starts = torch.arange(0, rows * columns, per_group) // (rows * columns // scale.numel())
            scale, zero = (part[starts].view(rows, columns // per_group) for part in (scale, zero))
            is_integer = bool(((zero == zero.round()) & (zero >= 0) & (zero <= 16)).all())
            if is_narrow and is_integer:
                return from_codes(codes, 4, Groups(scale, zero.short()))
            layout = AFFINE4 if is_narrow else AFFINE8
        weight = pack_nibbles(codes) if is_narrow else codes
        return PackedWeight(layout, stored.shape, {"weight": weight, "scale": scale, "zero": zero}, stored.block)

    def _codes(self, stored: StoredWeight, read: Read, count: int, groups: int) -> Tensor:
        """The matrix M, flattened."""
        packing = _text(read(stored.parts["packing"]).reshape(-1).tolist())
        dtype, bits, per_word = _PACKINGS[packing]
        rows, columns = (groups, count // groups) if stored.block is not None else (count // groups, groups)
        words = read(stored.parts["W_q"]).contiguous().view(-1).view(dtype).view(-1, columns)
        mask = (1 << bits) - 1
        blocks = [((words >> (bits * position)) & mask).to(torch.uint8) for position in reversed(range(per_word))]
        return torch.cat(blocks)[:rows].flatten()

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns // 2 + 4 * rows * -(-columns // (options.group_size or 64))


def _text(codes: Sequence[int]) -> str:
    return "".join(chr(code) if 0 <= code < 128 else "\N{REPLACEMENT CHARACTER}" for code in codes)


FORMAT = Hqq()
