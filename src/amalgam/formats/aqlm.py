"""AQLM (Egiazarian et al. 2024): additive codebooks. r × c neighbouring weights are a sum of one vector of each book.

    codes      int8 (int16 above 8 bits) [out / r, in / c, books]: the number of a vector, modulo their count
    codebooks  float [books, 2^bits, r, c]
    scales     float [out / r, 1, 1, 1]

`w[r i.., c j..] = scales[i] × Σ codebooks[b, codes[i, j, b]]`. Numbers from the middle on are stored less 2^bits.
Source: inference_lib/src/aqlm/inference.py and utils.py of github.com/Vahe1994/AQLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from amalgam.errors import CheckpointError
from amalgam.formats.common.scales import SCALE_DTYPES
from amalgam.formats.contract import (
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    expect_shape,
    finite,
    owned,
    refuse_part,
)
from amalgam.formats.declared.values import Codebooks
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import CODEBOOKS
from amalgam.kernels.weights import PackedWeight

_CODES, _BOOKS, _SCALES = "codes", "codebooks", "scales"
_MOST_BITS = 16
# What a weight whose headers are not there is taken for: AQLM's own default is 16 bits, of which the book is most.
_TYPICAL = Codebooks(number=2, bits=8, rows=1, columns=8)


class Aqlm(WeightFormat):
    """Additive codebooks with a scale for each row, or group of rows."""

    layouts = (CODEBOOKS,)
    name = "aqlm"
    has_vectors = True
    anchor = _CODES
    required = frozenset({_CODES, _BOOKS, _SCALES})
    methods = frozenset({"aqlm"})

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        codes, scales = parts[_CODES], parts[_SCALES]
        books = _books_of(name, parts[_BOOKS])
        declared = context.declared.codebooks
        if declared not in (None, books):
            refuse_part(name, parts[_BOOKS], f"{context.declared.where} declares {declared}.")
        expect_dtype(name, codes, (torch.int8 if books.bits <= 8 else torch.int16,))
        if len(codes.shape) != 3 or 0 in codes.shape or codes.shape[2] != books.number:
            refuse_part(name, codes, f"Expected [out / {books.rows}, in / {books.columns}, {books.number}].")
        expect_dtype(name, scales, SCALE_DTYPES)
        expect_shape(name, scales, (codes.shape[0], 1, 1, 1))
        shape = (codes.shape[0] * books.rows, codes.shape[1] * books.columns)
        bits = max(1, round(books.number * books.bits / (books.rows * books.columns)))
        return StoredWeight(name, self, shape, parts, (books.rows, shape[1]), bits)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        assert stored.block is not None
        return 0 if role == _BOOKS else stored.block[0]

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        books = owned(finite(stored, _BOOKS, read(stored.parts[_BOOKS])))
        codes = owned(_in_range(stored, read(stored.parts[_CODES]), books.shape[1]))
        scale = owned(finite(stored, _SCALES, read(stored.parts[_SCALES]))).view(-1, 1)
        return PackedWeight(
            CODEBOOKS, stored.shape, {"weight": codes, "codebooks": books, "scale": scale}, stored.block
        )

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        vectors = math.prod(shape) // (_TYPICAL.rows * _TYPICAL.columns)
        books = _TYPICAL.number * _TYPICAL.rows * _TYPICAL.columns << _TYPICAL.bits
        return vectors * _TYPICAL.number + 2 * (books + shape[0])


def _books_of(name: str, part: TensorPart) -> Codebooks:
    """What the shape of the codebooks says."""
    expect_dtype(name, part, SCALE_DTYPES)
    if len(part.shape) != 4 or 0 in part.shape:
        refuse_part(name, part, "Expected [codebooks, vectors, rows, inputs].")
    number, vectors, rows, columns = part.shape
    bits = vectors.bit_length() - 1
    if vectors != 1 << bits or not 1 <= bits <= _MOST_BITS:
        refuse_part(name, part, f"Expected a power of two from 2 to {1 << _MOST_BITS} vectors in each codebook.")
    return Codebooks(number, bits, rows, columns)


def _in_range(stored: StoredWeight, codes: Tensor, vectors: int) -> Tensor:
    """Codes that name one of so many vectors, whether numbers from the middle on are stored less their count or not."""
    low, high = (int(bound) for bound in codes.aminmax())
    if low < -vectors // 2 or high >= vectors:
        part = stored.parts[_CODES]
        raise CheckpointError(
            f"Tensor {part.name!r} of weight {stored.name!r} holds the codes {low}..{high} in {part.file.name}.",
            remedy=f"A codebook of {vectors} vectors has {-vectors // 2}..{vectors - 1}: the file is damaged, or "
            "its codebooks belong to another one.",
        )
    return codes


FORMAT = Aqlm()
