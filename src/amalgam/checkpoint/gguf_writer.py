"""A GGUF file, written tensor by tensor.

In: metadata, names, tensors as bytes of rows. Out: the file. Must never know what a name, a key or a block means.

What stands before the data is as long whatever the types are, so it is written last, into the room left for it: types
may be chosen while the data pass by, and no tensor is held twice. Layout: `amalgam.checkpoint.gguf`.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.checkpoint.gguf import BLOCK_TYPES, MAGIC, PLAIN_TYPES, VERSIONS

_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_U8, _I8, _U16, _I16, _U32, _I32, _F32, _BOOL, _U64, _I64, _F64 = (*range(8), 10, 11, 12)
_CODES = {_U8: "B", _I8: "b", _U16: "H", _I16: "h", _U32: "I", _I32: "i", _F32: "f", _BOOL: "?"} | {
    _U64: "Q",
    _I64: "q",
    _F64: "d",
}
# Types of arrays that the header's reader hands out as `array.array`.
_KINDS = {code: kind for kind, code in _CODES.items()}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TYPE_IDS = {block.name: number for number, block in BLOCK_TYPES.items()} | {
    name: number for name, dtype in FLOATS.items() for number, plain in PLAIN_TYPES.items() if plain is dtype
}


@dataclass(frozen=True)
class _Written:
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufWriter:
    """One file of version 3.

    Args:
        ranks: every tensor that will be added, in order → how many dimensions it has.
        metadata: by key. Whole numbers become uint32 where they fit, fractions float32; of an empty list nothing is
            written. Numbers may be others at the end, of the same type.
    """

    def __init__(self, file: Path, metadata: Mapping[str, Any], ranks: Mapping[str, int]) -> None:
        self._ranks = ranks
        self._names = list(ranks)
        self._written: dict[str, _Written] = {}
        self._header_bytes = len(self._header(metadata))
        self._file = file.open("wb")
        self._file.write(bytes(self._header_bytes))
        self._end = 0

    def add(self, name: str, shape: tuple[int, ...], kind: str, chunks: Iterable[Tensor]) -> int:
        """Write one tensor and return its bytes.

        Args:
            shape: in elements.
            kind: ggml's name of the type, `Q4_0` or `BF16`.
            chunks: its data one after the other, of any type and shape. If they end with an error, the tensor has not
                been added, and may be anew.
        """
        assert self._names[len(self._written)] == name and self._ranks[name] == len(shape), name
        start = self._end
        try:
            for chunk in chunks:
                data = memoryview(chunk.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                self._file.write(data)
                self._end += data.nbytes
        except Exception:
            self._end = start
            self._file.seek(self._header_bytes + start)
            self._file.truncate()
            raise
        nbytes = self._end - start
        assert nbytes == type_bytes(shape, kind), (name, shape, kind, nbytes)
        self._note(name, shape, kind, start)
        return nbytes

    def skip(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        """Leave a hole where a tensor would be: for files that only what they describe is read of."""
        start = self._end
        self._end += type_bytes(shape, kind)
        self._file.seek(self._header_bytes + self._end)
        self._note(name, shape, kind, start)

    def _note(self, name: str, shape: tuple[int, ...], kind: str, start: int) -> None:
        self._written[name] = _Written(shape, _TYPE_IDS[kind], start)
        padding = -self._end % _ALIGNMENT
        self._file.write(bytes(padding))
        self._end += padding

    def finish(self, metadata: Mapping[str, Any]) -> None:
        """Write what stands before the data; the file is complete."""
        assert len(self._written) == len(self._ranks)
        header = self._header(metadata)
        assert len(header) == self._header_bytes, "metadata have changed in size"
        self._file.truncate(self._header_bytes + self._end)
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Give up: the file is not complete."""
        self._file.close()

    def _header(self, metadata: Mapping[str, Any]) -> bytes:
        pairs = {key: value for key, value in metadata.items() if not _is_empty(value)}
        parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(self._ranks), len(pairs))]
        for key, value in pairs.items():
            parts += [_string(key), _value(value)]
        for name, rank in self._ranks.items():
            tensor = self._written.get(name, _Written((0,) * rank, 0, 0))
            sizes = struct.pack(f"<I{rank}Q", rank, *reversed(tensor.shape))
            parts += [_string(name), sizes, struct.pack("<IQ", tensor.kind, tensor.offset)]
        header = b"".join(parts)
        return header + bytes(-len(header) % _ALIGNMENT)


def type_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of a shape, in elements, in a type."""
    if kind in FLOATS:
        return prod(shape) * FLOATS[kind].itemsize
    block = BLOCK_TYPES[_TYPE_IDS[kind]]
    return prod(shape) // block.num_elements * block.num_bytes


def _is_empty(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and not len(value)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _kind(value: Any) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        return _U32 if 0 <= value < 2**32 else _I32 if -(2**31) <= value < 0 else _I64
    assert isinstance(value, float), value
    return _F32


def _value(value: Any) -> bytes:
    """The type and the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, Sequence):
        return struct.pack("<I", _ARRAY) + _items(value)
    kind = _kind(value)
    return struct.pack(f"<I{_CODES[kind]}", kind, value)


def _items(values: Sequence[Any]) -> bytes:
    if isinstance(values, array):
        kind = _KINDS[values.typecode]
        return struct.pack("<IQ", kind, len(values)) + values.tobytes()
    if isinstance(values[0], str):
        return struct.pack("<IQ", _STRING, len(values)) + b"".join(map(_string, values))
    kinds = {_kind(value) for value in values}
    kind = _I32 if kinds <= {_U32, _I32} else kinds.pop()  # llama.cpp's readers take int32 for lists
    return struct.pack(f"<IQ{len(values)}{_CODES[kind]}", kind, len(values), *values)
