"""The header of a safetensors file, taken from somebody we do not trust.

In: a file. Out: one `TensorEntry` per tensor, each proven to lie inside the file and to overlap no other. Reads the
header only, never the data, and refuses what would be slow or large to parse before parsing it.

Layout (https://huggingface.co/docs/safetensors):

    0        8                8 + N                                       end of file
    | u64 N  | N bytes of JSON | data; data_offsets [begin, end) count from here |
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch

from amalgam.base.strict_json import parse_foreign_json
from amalgam.errors import CheckpointError, describe

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
PREFIX_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
# A header describes data. One that is larger than its data was made to be slow to read; small models are excused.
SMALL_HEADER_BYTES = 2**20
# About 500,000 tensors. Commas bound every kind of bomb (tensors, shapes, metadata) and, unlike keys, have no escapes.
MAX_COMMAS = 3_000_000
MAX_RANK = 8
MAX_ELEMENTS = 2**60
_KEYS = {"dtype", "shape", "data_offsets"}
_SIZE_TYPES = {int}  # not bool, which is an int to isinstance
_LFS_MAGIC = b"version "
_DAMAGED = "The file is damaged or hostile: download it again from a source that you trust."


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, not read yet.

    `offset` counts bytes from the start of the file; None where the container does not tell (`.bin`). `encoding` is
    the ggml type of a quantized GGUF tensor: its `dtype` is then uint8 and its last dimension a row's bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int | None
    encoding: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of the elements in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, start: int, shape: tuple[int, ...]) -> TensorEntry:
        """The elements from `start` on, in row-major order, as a tensor of `shape`: one expert of a stack of them."""
        assert self.offset is not None
        assert 0 <= start <= start + math.prod(shape) <= math.prod(self.shape), (self, start, shape)
        return replace(self, offset=self.offset + start * self.dtype.itemsize, shape=shape)


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, by rising offset.

    Raises:
        CheckpointError: truncated, damaged or hostile; names the file, the tensor and the value.
    """
    try:
        with file.open("rb") as stream:
            return parse_header(stream, file)[0]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}).", remedy="Check the file.") from error


def parse_header(stream: BinaryIO, file: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """The same of an open file, or of one in memory, with its metadata; `file` names it.

    Raises:
        CheckpointError: as `read_header`.
        OSError: it cannot be read.
    """
    file_bytes = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    prefix = stream.read(PREFIX_BYTES)
    if prefix == _LFS_MAGIC:
        _refuse(file, "is a Git LFS pointer, not the weights", "Run `git lfs pull` in its folder.")
    if len(prefix) < PREFIX_BYTES:
        _refuse(file, f"has {file_bytes} bytes, fewer than the {PREFIX_BYTES} that every safetensors file begins with")
    header_bytes = int.from_bytes(prefix, "little")
    data_start = PREFIX_BYTES + header_bytes
    if header_bytes > MAX_HEADER_BYTES:
        _refuse(file, f"announces a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed")
    if data_start > file_bytes:
        _refuse(file, f"is truncated: it has {file_bytes} bytes, its header alone needs {data_start}")
    if header_bytes > max(SMALL_HEADER_BYTES, file_bytes - data_start):
        _refuse(file, f"has a header of {header_bytes} bytes for only {file_bytes - data_start} bytes of data")
    _check_commas(file, stream, header_bytes)

    stream.seek(PREFIX_BYTES)
    raw = stream.read(header_bytes)
    if not raw.startswith(b"{"):
        _refuse(file, f"has a header that begins with {raw[:8]!r} instead of '{{'")
    header = parse_foreign_json(raw, f"The header of {file}")  # an object: it begins with a brace
    metadata = _checked_metadata(file, header.pop("__metadata__", {}))
    layouts: dict[tuple[str, tuple[int, ...]], _Layout] = {}
    entries = [_entry(file, data_start, name, info, layouts) for name, info in header.items()]
    check_ranges(file, file_bytes, entries)
    return entries, metadata


def _check_commas(file: Path, stream: BinaryIO, header_bytes: int) -> None:
    num_commas = 0
    remaining = header_bytes
    while chunk := stream.read(min(remaining, 2**20)):
        num_commas += chunk.count(b",")
        remaining -= len(chunk)
        if num_commas > MAX_COMMAS:
            _refuse(file, f"has a header with over {MAX_COMMAS} commas, which means over half a million tensors")


def _checked_metadata(file: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        _refuse(file, f"has __metadata__ {describe(metadata)} instead of an object of strings")
    for key, value in metadata.items():
        if not isinstance(value, str):
            _refuse(file, f"has __metadata__ {describe(key)} of {describe(value)} instead of a string")
    return metadata


_Layout = tuple[torch.dtype, tuple[int, ...], int]


def _entry(
    file: Path, data_start: int, name: str, info: Any, layouts: dict[tuple[str, tuple[int, ...]], _Layout]
) -> TensorEntry:
    """
    Args:
        layouts: (dtype, shape) → the same checked, and the bytes: a model has many tensors of a few kinds.
    """
    if not name or not name.isprintable():
        _refuse_tensor(file, name, "with a name that is empty or unprintable")
    if not isinstance(info, dict) or info.keys() != _KEYS:
        _refuse_tensor(file, name, f"as {describe(info)} instead of by dtype, shape and data_offsets")
    kind, sizes, offsets = info["dtype"], info["shape"], info["data_offsets"]
    # Types first: to a dictionary true and 1.0 are the key 1.
    if not isinstance(kind, str) or not isinstance(sizes, list) or not _SIZE_TYPES.issuperset(map(type, sizes)):
        _check_layout(file, name, kind, sizes)
    key = kind, tuple(sizes)
    layout = layouts.get(key)
    if layout is None:
        layout = layouts[key] = _check_layout(file, name, kind, sizes)
    dtype, shape, nbytes = layout
    if not isinstance(offsets, list) or len(offsets) != 2 or not _SIZE_TYPES.issuperset(map(type, offsets)):
        _refuse_tensor(file, name, f"with data_offsets {describe(offsets)} instead of two integers")
    begin, end = offsets
    if not 0 <= begin <= end:
        _refuse_tensor(file, name, f"with data_offsets {describe(offsets)}, which do not rise from 0 or above")
    if end - begin != nbytes:
        _refuse_tensor(
            file,
            name,
            f"with data_offsets {describe(offsets)}, {describe(end - begin)} bytes, but its shape {sizes} of {kind} "
            f"takes {nbytes}",
        )
    return TensorEntry(name, dtype, shape, file, data_start + begin)


def _check_layout(file: Path, name: str, kind: Any, shape: Any) -> _Layout:
    """Type, shape and bytes."""
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        _refuse_tensor(file, name, f"with dtype {describe(kind)}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list):
        _refuse_tensor(file, name, f"with shape {describe(shape)} instead of a list")
    if len(shape) > MAX_RANK:
        _refuse_tensor(file, name, f"with {len(shape)} dimensions; at most {MAX_RANK} are allowed")
    if not _SIZE_TYPES.issuperset(map(type, shape)) or min(shape, default=0) < 0:
        _refuse_tensor(file, name, f"with shape {describe(shape)} instead of a list of integers of at least 0")
    # Empty tensors count too: their strides must fit 64 bits.
    num_elements = math.prod(shape)
    if (num_elements or math.prod(max(size, 1) for size in shape)) > MAX_ELEMENTS:
        _refuse_tensor(file, name, f"with shape {describe(shape)}; at most {MAX_ELEMENTS} elements are allowed")
    return dtype, tuple(shape), num_elements * dtype.itemsize


def _refuse_tensor(file: Path, name: str, what: str) -> NoReturn:
    _refuse(file, f"describes tensor {describe(name)} {what}")


def check_ranges(file: Path, file_bytes: int, entries: list[TensorEntry]) -> None:
    """Sort `entries` by offset; they must lie in the file and not overlap. Holes are harmless."""
    ranges = [(entry.offset or 0, entry.nbytes, index) for index, entry in enumerate(entries)]
    ranges.sort()
    entries[:] = [entries[index] for _, _, index in ranges]
    end = 0
    previous = ""
    for (offset, nbytes, _), entry in zip(ranges, entries, strict=True):
        if offset < end:
            _refuse(
                file,
                f"describes tensor {describe(entry.name)} at byte {offset}, which overlaps tensor "
                f"{describe(previous)} that ends at byte {end}",
            )
        end = offset + nbytes
        previous = entry.name
    if end > file_bytes:
        _refuse(
            file,
            f"is truncated or damaged: its tensors end at byte {describe(end)} (tensor {describe(previous)}), "
            f"the file has {file_bytes} bytes",
        )


def _refuse(file: Path, what: str, remedy: str = _DAMAGED) -> NoReturn:
    raise CheckpointError(f"{file} {what}.", remedy=remedy)
