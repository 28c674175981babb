"""AWQ (Lin et al. 2023) in AutoAWQ's GEMM layout, 4 bits, packed along the outputs in an order of its own.

    qweight  int32 [in, out / 8]
    qzeros   int32 [groups, out / 8]
    scales   float [groups, out]

Word c of a row holds outputs 8c .. 8c + 7; nibble n, lowest first, is output 8c + (0, 2, 4, 6, 1, 3, 5, 7)[n].
`w[o, i] = (q[i, o] - z[g, o]) × scales[g, o]`; zero points are stored as they are, all 8 where a file declares
`zero_point` false (AutoRound).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from amalgam.formats.common.integers import Groups, from_codes, unpack_words
from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    expect_shape,
    finite,
    group_block,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import INT4
from amalgam.kernels.weights import PackedWeight

_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)
_MIDDLE = 8


class Awq(WeightFormat):
    """AutoAWQ's GEMM version."""

    layouts = (INT4,)
    name = "awq-int4"
    required = frozenset({"qweight", "qzeros", "scales"})
    methods = frozenset({"awq", "auto-round"})
    number = "int"
    bits = 4

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        if context.declared.layout != "awq":
            return None
        qweight, qzeros, scales = (parts[role] for role in ("qweight", "qzeros", "scales"))
        for entry in (qweight, qzeros):
            expect_dtype(name, entry, (torch.int32,))
        expect_dtype(name, scales, SCALE_DTYPES)
        for entry in (qweight, qzeros, scales):
            if len(entry.shape) != 2 or 0 in entry.shape:
                refuse_part(name, entry, "Expected two dimensions.")
        groups, rows = scales.shape
        columns = qweight.shape[0]
        if rows % 8:
            refuse_part(name, scales, "Expected a multiple of 8 outputs.")
        expect_shape(name, qweight, (columns, rows // 8))
        expect_shape(name, qzeros, (groups, rows // 8))
        block = group_block(name, scales, columns, groups, context.declared)
        return StoredWeight(name, self, (rows, columns), parts, block, 4)

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        scale = owned(finite(stored, "scales", read(stored.parts["scales"])).t())
        codes = owned(_unpack(read(stored.parts["qweight"])).t())
        zero = _unpack(read(stored.parts["qzeros"])).t().short()
        if stored.declared.is_symmetric and bool((zero != _MIDDLE).any()):
            refuse_part(
                stored.name,
                stored.parts["qzeros"],
                f"{stored.declared.where} declares symmetric weights, whose zero points are all {_MIDDLE}.",
            )
        assert stored.block is not None
        return from_codes(codes, 4, Groups(scale, zero, size=stored.block[1]))

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns // 2 + 3 * rows * -(-columns // (options.group_size or 128))


def _unpack(words: Tensor) -> Tensor:
    """int32 `[n, out / 8]` → uint8 `[n, out]`."""
    nibbles = unpack_words(words, 4).view(words.shape[0], -1, 8)
    return nibbles[:, :, list(_NIBBLE_OF_OUTPUT)].flatten(1)


FORMAT = Awq()
