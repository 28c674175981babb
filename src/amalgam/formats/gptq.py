"""GPTQ (Frantar et al. 2022) as AutoGPTQ, GPTQModel and AutoRound publish it: 2, 3, 4 or 8 bits along the inputs.

    qweight  int32 [in × bits / 32, out]      each column one stream of bits, low bits first
    qzeros   int32 [groups, out × bits / 32]  each row one stream of bits
    scales   float [groups, out]
    g_idx    int32 [in]                       group of each input; absent when inputs are in order

The last group has fewer inputs where the size of a group does not divide their number.

`w[o, i] = scales[g, o] × (q[i, o] - z[g, o])`. Version 1 stores z - 1, version 2 stores z. Published files exist that
declare version 1 and hold version 2; with symmetric quantization the zero point is 2^(bits - 1), so that the data
decide: all fields 2^(bits - 1) are version 2, all one less version 1, and anything else contradicts `sym`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amalgam.errors import CheckpointError
from amalgam.formats.common.integers import (
    WIDTHS,
    Groups,
    from_codes,
    from_nibbles,
    group_index,
    unpack_words,
)
from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    expect_index,
    expect_shape,
    finite,
    group_block,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import AFFINE8, INT4, SCALED8
from amalgam.kernels.weights import PackedWeight


class Gptq(WeightFormat):
    """GPTQ's words with a number of bits."""

    layouts = (INT4, SCALED8, AFFINE8)

    required = frozenset({"qweight", "qzeros", "scales"})
    optional = frozenset({"g_idx"})
    methods = frozenset({"gptq", "auto-round"})
    number = "int"
    bits: int

    def __init__(self, bits: int) -> None:
        self.name = f"gptq-int{bits}"
        self.bits = bits

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        declared = context.declared
        if declared.layout not in ("gptq", "gptq_v2"):
            if declared.layout == "awq":
                return None
            raise CheckpointError(
                f"Weight {name!r} has qweight, qzeros and scales, whose order of bits and zero points only a "
                f"declaration tells, and {declared.where or 'the checkpoint'} declares no gptq, awq or auto-round.",
                remedy="Put the quantization_config or quantize_config.json of the checkpoint beside it.",
            )
        qweight, qzeros, scales = (parts[role] for role in ("qweight", "qzeros", "scales"))
        for entry in (qweight, qzeros):
            expect_dtype(name, entry, (torch.int32,))
        expect_dtype(name, scales, SCALE_DTYPES)
        for entry in (qweight, qzeros, scales):
            if len(entry.shape) != 2 or 0 in entry.shape:
                refuse_part(name, entry, "Expected two dimensions.")
        if declared.bits not in WIDTHS:
            raise CheckpointError(
                f"Weight {name!r} is GPTQ with {declared.bits} bits by {declared.where}.",
                remedy=f"Supported: {', '.join(map(str, WIDTHS))}.",
            )
        if declared.bits != self.bits:
            return None
        groups, rows = scales.shape
        if qweight.shape[1] != rows:
            refuse_part(name, qweight, f"Expected [in × {self.bits} / 32, {rows}].")
        expect_shape(name, qzeros, (groups, -(-rows * self.bits // 32)))
        if qweight.shape[0] * 32 % self.bits:
            refuse_part(name, qweight, f"Expected [in × {self.bits} / 32, out].")
        columns = qweight.shape[0] * 32 // self.bits
        block = group_block(name, scales, columns, groups, declared)
        expect_index(name, "g_idx", parts, groups, declared)
        if "g_idx" in parts:
            expect_dtype(name, parts["g_idx"], (torch.int32, torch.int64))
            expect_shape(name, parts["g_idx"], (columns,))
        return StoredWeight(name, self, (rows, columns), parts, block, self.bits)

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        rows, columns = stored.shape
        scale = owned(finite(stored, "scales", read(stored.parts["scales"])).t())
        fields = unpack_words(read(stored.parts["qzeros"]), self.bits)[:, :rows].t()
        zero = fields.short() + self._zero_offset(stored, fields)
        assert stored.block is not None
        groups = Groups(scale, zero, size=stored.block[1])
        if "g_idx" in stored.parts:
            part = stored.parts["g_idx"]
            group = group_index(stored.name, part.name, read(part), scale.shape[1], groups.size)
            groups = groups._replace(group=group)
        words = owned(read(stored.parts["qweight"]).t())
        if self.bits == 4:
            return from_nibbles(words.view(torch.uint8), (rows, columns), groups)
        return from_codes(unpack_words(words, self.bits), self.bits, groups)

    def _zero_offset(self, stored: StoredWeight, fields: Tensor) -> int:
        """1 where zero points are stored less one, else 0."""
        low, high = int(fields.min()), int(fields.max())
        middle = 1 << (self.bits - 1)
        if stored.declared.is_symmetric:
            if low == high == middle:
                return 0
            if low == high == middle - 1:
                return 1
            raise CheckpointError(
                f"Tensor {stored.parts['qzeros'].name!r} of weight {stored.name!r} holds {low}..{high}, but "
                f"{stored.declared.where} declares sym: true.",
                remedy=f"Symmetric zero points are all {middle} (version 2) or all {middle - 1} (version 1).",
            )
        if stored.declared.layout == "gptq_v2":
            return 0
        if high == (1 << self.bits) - 1:
            raise CheckpointError(
                f"Tensor {stored.parts['qzeros'].name!r} of weight {stored.name!r} holds a field of all ones, which in "
                "GPTQ version 1 means zero point -1 or 2^bits, depending on the tool that wrote it.",
                remedy="Convert the checkpoint to checkpoint_format gptq_v2 with the tool that made it.",
            )
        return 1

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        values = rows * columns if self.bits == 8 else rows * columns // 2
        return values + 2 * rows * -(-columns // (options.group_size or 128))


FORMATS = tuple(Gptq(bits) for bits in WIDTHS)
