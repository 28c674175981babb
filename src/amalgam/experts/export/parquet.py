"""A table → an Apache Parquet file: flat columns of int64 and double, plain encoding, no compression, one row group.

In: columns. Out: bytes. Follows the Parquet format specification 2.x; its metadata is Thrift's compact protocol.

A writer of our own: this subset takes a hundred lines, the usual library as many megabytes.

    file    PAR1 | column chunk … | FileMetaData | length of it, uint32 | PAR1
    chunk   one data page: PageHeader | definition levels (optional columns only) | values
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MAGIC = b"PAR1"
_INT64, _DOUBLE = 2, 5  # physical types
_REQUIRED, _OPTIONAL = 0, 1
_PLAIN, _RLE = 0, 3
_UNCOMPRESSED = 0
_CREATOR = "amalgam"
# Thrift compact types
_I32, _I64, _BINARY, _LIST, _STRUCT = 5, 6, 8, 9, 12
_Value = int | str | list["_Value"] | dict[int, "_Value"]


@dataclass(frozen=True)
class _Column:
    name: str
    type: int
    repetition: int
    page: bytes  # header and data
    num_values: int


def write_parquet(columns: Mapping[str, Sequence[float | int | None]]) -> bytes:
    """Columns of equal length; a column that holds a float or None is an optional double, others are int64."""
    parts, body, offset = [_encode_column(name, values) for name, values in columns.items()], [_MAGIC], len(_MAGIC)
    num_rows = len(next(iter(columns.values()), ()))
    chunks: list[_Value] = []
    for column in parts:
        chunks.append(_chunk_metadata(column, offset))
        body.append(column.page)
        offset += len(column.page)
    schema: list[_Value] = [{4: "schema", 5: _Int32(len(parts))}]
    schema += [{1: _Int32(column.type), 3: _Int32(column.repetition), 4: column.name} for column in parts]
    row_group: _Value = {1: chunks, 2: sum(len(column.page) for column in parts), 3: num_rows}
    footer = _struct({1: _Int32(1), 2: schema, 3: num_rows, 4: [row_group], 6: _CREATOR})
    return b"".join([*body, footer, struct.pack("<I", len(footer)), _MAGIC])


class _Int32(int):
    """Thrift writes 32 and 64 bits alike, under different types."""


def _encode_column(name: str, values: Sequence[float | int | None]) -> _Column:
    if all(type(value) is int for value in values):
        return _column(name, _INT64, _REQUIRED, np.array(values, "<i8").tobytes(), len(values))
    is_known = np.array([value is not None for value in values], bool)
    known = np.array([value for value in values if value is not None], "<f8").tobytes()
    levels = _levels(is_known)
    return _column(name, _DOUBLE, _OPTIONAL, struct.pack("<I", len(levels)) + levels + known, len(values))


def _levels(is_known: npt.NDArray[np.bool_]) -> bytes:
    """Definition levels of one bit as one bit-packed run of the hybrid encoding, eight to a byte, lowest bit first."""
    num_groups = -(-len(is_known) // 8)
    return _varint(num_groups << 1 | 1) + np.packbits(is_known, bitorder="little").tobytes()


def _column(name: str, kind: int, repetition: int, data: bytes, num_values: int) -> _Column:
    data_header: _Value = {1: _Int32(num_values), 2: _Int32(_PLAIN), 3: _Int32(_RLE), 4: _Int32(_RLE)}
    header = _struct({1: _Int32(0), 2: _Int32(len(data)), 3: _Int32(len(data)), 5: data_header})
    return _Column(name, kind, repetition, header + data, num_values)


def _chunk_metadata(column: _Column, offset: int) -> _Value:
    size = len(column.page)
    encodings: _Value = [_Int32(_PLAIN), _Int32(_RLE)]
    metadata: _Value = {
        1: _Int32(column.type), 2: encodings, 3: [column.name], 4: _Int32(_UNCOMPRESSED), 5: column.num_values,
        6: size, 7: size, 9: offset,
    }  # fmt: skip
    return {2: offset, 3: metadata}


def _struct(fields: Mapping[int, _Value]) -> bytes:
    """A Thrift struct: each field after its type and the distance of its id from the one before."""
    result, last = b"", 0
    for field_id, value in sorted(fields.items()):
        kind, content = _encode(value)
        result += bytes([(field_id - last) << 4 | kind]) + content
        last = field_id
    return result + b"\0"


def _encode(value: _Value) -> tuple[int, bytes]:
    if isinstance(value, _Int32):
        return _I32, _zigzag(value)
    if isinstance(value, int):
        return _I64, _zigzag(value)
    if isinstance(value, str):
        raw = value.encode()
        return _BINARY, _varint(len(raw)) + raw
    if isinstance(value, dict):
        return _STRUCT, _struct(value)
    items = [_encode(item) for item in value]
    kind = items[0][0] if items else _STRUCT
    size = bytes([len(items) << 4 | kind]) if len(items) < 15 else bytes([0xF0 | kind]) + _varint(len(items))
    return _LIST, size + b"".join(content for _, content in items)


def _zigzag(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else -value * 2 - 1)


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)
