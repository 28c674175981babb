"""The header of a GGUF file, taken from somebody we do not trust.

In: a file. Out: its metadata, and one `TensorEntry` per tensor, each proven to lie inside the file and to overlap no
other. Reads the header only, never the data; every count is checked against what the file can hold before it is
believed. Must never know what a tensor's name or a metadata key means, apart from the container's own.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian:

    "GGUF" | u32 version | u64 tensors | u64 pairs | pairs | tensor table | padding | data
    pair    = string key, u32 type, value            string = u64 bytes, UTF-8      array = u32 type, u64 count, values
    tensor  = string name, u32 rank, u64 sizes (innermost first), u32 type, u64 offset from the start of the data

A model may be split over files `name-00001-of-0000N.gguf`; the first has the metadata.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NoReturn, overload

import torch

from amalgam.base.folders import member
from amalgam.base.mapping import MappedFile
from amalgam.checkpoint.safetensors_header import MAX_ELEMENTS, TensorEntry, check_ranges
from amalgam.checkpoint.shards import MappedShard, identify
from amalgam.errors import CheckpointError, describe

SUFFIX = ".gguf"
MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 counted in 32 bits and is gone from the world
# Limits. The largest published vocabularies have 262,144 tokens and some 500,000 merges in 20 MB of header.
MAX_HEADER_BYTES = 2**27
MAX_PAIRS = 2**16
MAX_TENSORS = 2**16
MAX_ARRAY_ITEMS = 2**21  # in all arrays together
MAX_STRING_BYTES = 2**20
MAX_NAME_BYTES = 1024
MAX_RANK = 4
MAX_ALIGNMENT = 2**20
_DEFAULT_ALIGNMENT = 32
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_DAMAGED = "The file is damaged or hostile: download it again from a source that you trust."

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

PLAIN_TYPES = {
    0: torch.float32,
    1: torch.float16,
    24: torch.int8,
    25: torch.int16,
    26: torch.int32,
    27: torch.int64,
    28: torch.float64,
    30: torch.bfloat16,
}


@dataclass(frozen=True)
class BlockType:
    """A ggml type that packs `num_elements` neighbours of a row into `num_bytes`."""

    name: str
    num_elements: int
    num_bytes: int

    def logical_shape(self, packed: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in elements of a tensor whose last dimension counts a row's bytes."""
        return (*packed[:-1], packed[-1] // self.num_bytes * self.num_elements)


BLOCK_TYPES = {
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    10: BlockType("Q2_K", 256, 84),
    11: BlockType("Q3_K", 256, 110),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    23: BlockType("IQ4_XS", 256, 136),
    39: BlockType("MXFP4", 32, 17),
}
_UNSUPPORTED = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
    41: "Q1_0",
}


class StringArray(Sequence[str]):
    """An array of strings in a file's metadata, decoded when first looked at."""

    def __init__(self, key: str, file: Path, start: int, end: int, count: int) -> None:
        self._key, self._file, self._start, self._end, self._count = key, file, start, end, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return self._values[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __repr__(self) -> str:
        return f"<{self._count} strings>"

    @cached_property
    def _values(self) -> list[str]:
        with self._file.open("rb") as stream:
            stream.seek(self._start)
            raw = stream.read(self._end - self._start)
        values = []
        position = 0
        try:
            for _ in range(self._count):
                (length,) = struct.unpack_from("<Q", raw, position)
                values.append(raw[position + 8 : position + 8 + length].decode())
                position += 8 + length
        except (struct.error, UnicodeDecodeError) as error:
            _refuse(self._file, f"holds an invalid string in {describe(self._key)} ({error})")
        return values


@dataclass(frozen=True)
class GgufHeader:
    """Metadata by key (scalars, strings, arrays as sequences) and tensors by rising offset."""

    metadata: Mapping[str, Any]
    entries: list[TensorEntry]


class GgufShard(MappedShard):
    """A GGUF file. Quantized tensors are read as uint8, rows of blocks; `TensorEntry.encoding` names the type."""

    def __init__(self, file: Path) -> None:
        identity = identify(file)  # before the header, so that a change in between is noticed
        header = read_header(file)
        super().__init__(file, identity, header.entries)
        self.metadata = header.metadata


def list_split(file: Path) -> list[Path]:
    """All files of the model that `file` belongs to, itself alone if its name is not that of a part.

    Raises:
        CheckpointError: a part is missing.
    """
    match = _SPLIT_NAME.fullmatch(file.name)
    if match is None:
        return [file]
    count, number = int(match["count"]), int(match["number"])
    if not 1 <= number <= count:
        _refuse(file, f"is by its name part {number} of {count}", "Give the parts the names they were published with.")
    return [member(file.parent, f"{match['stem']}-{part:05}-of-{match['count']}.gguf") for part in range(1, count + 1)]


def open_split(files: Sequence[Path]) -> list[GgufShard]:
    """The parts of one model, in order, proven to belong together.

    Raises:
        CheckpointError: a part is damaged, or is not the part that its name says.
    """
    shards = [GgufShard(file) for file in files]
    architecture = shards[0].metadata.get("general.architecture")
    if not isinstance(architecture, str):
        _refuse(files[0], f"has general.architecture = {describe(architecture)} instead of a name")
    for index, shard in enumerate(shards):
        found = tuple(shard.metadata.get(key, default) for key, default in (("split.count", 1), ("split.no", 0)))
        if found != (len(shards), index):
            _refuse(
                shard.file,
                f"has split.count = {describe(found[0])} and split.no = {describe(found[1])}, but is part {index + 1} "
                f"of {len(shards)} by its name",
                "Give the parts the names they were published with, all in one folder.",
            )
    total = sum(len(shard.entries) for shard in shards)
    declared = shards[0].metadata.get("split.tensors.count", total)
    if declared != total:
        _refuse(shards[0].file, f"has split.tensors.count = {describe(declared)}, but its parts hold {total}")
    return shards


def read_header(file: Path) -> GgufHeader:
    """Metadata and tensors of a GGUF file.

    Raises:
        CheckpointError: truncated, damaged or hostile, big-endian, of another version, or with a tensor type that is
            not supported; names the file, the field and the value.
    """
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            prefix = stream.read(len(MAGIC))
            if prefix == b"vers":
                _refuse(file, "is a Git LFS pointer, not the weights", "Run `git lfs pull` in its folder.")
            if prefix != MAGIC:
                _refuse(file, f"begins with {prefix!r} instead of {MAGIC!r}", "Is it a GGUF file?")
            with MappedFile(stream.fileno(), file_bytes, is_writable=False) as mapped:
                try:
                    return _Parser(file, file_bytes, mapped.pages).parse()
                finally:
                    if mapped.has_lost:
                        _refuse(file, "has become shorter while it was read", "Load the checkpoint again.")
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}).", remedy="Check the file.") from error


class _Parser:
    """A cursor over the header. Every read checks that its bytes are there."""

    def __init__(self, file: Path, file_bytes: int, pages: mmap.mmap) -> None:
        self.file = file
        self.file_bytes = file_bytes
        self.end = min(file_bytes, MAX_HEADER_BYTES)
        self.pages = pages
        self.position = len(MAGIC)
        self.items_left = MAX_ARRAY_ITEMS

    def parse(self) -> GgufHeader:
        version = self.number("I", "version")
        if version & 0xFFFF == 0 and version:
            self.refuse(f"is big-endian (version {version:#x})", "Use the little-endian file.")
        if version not in VERSIONS:
            self.refuse(f"has version {version}; supported are 2 and 3", "Convert the model again.")
        num_tensors = self.count("tensor count", MAX_TENSORS, 32)
        num_pairs = self.count("metadata count", MAX_PAIRS, 13)
        metadata: dict[str, Any] = {}
        for index in range(num_pairs):
            key = self.name(f"the key of metadata {index}")
            if key in metadata:
                self.refuse(f"has the metadata key {describe(key)} twice")
            metadata[key] = self.value(self.number("I", f"the type of {describe(key)}"), key)
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.refuse(
                f"has general.alignment = {describe(alignment)} instead of a power of two up to {MAX_ALIGNMENT}"
            )
        table = [self.tensor(index, alignment) for index in range(num_tensors)]
        data_start = -(-self.position // alignment) * alignment
        entries: dict[str, TensorEntry] = {}
        for name, dtype, shape, encoding, offset in table:
            if name in entries:
                self.refuse(f"describes tensor {describe(name)} twice")
            entries[name] = TensorEntry(name, dtype, shape, self.file, data_start + offset, encoding)
        ordered = list(entries.values())
        check_ranges(self.file, self.file_bytes, ordered)
        return GgufHeader(metadata, ordered)

    def refuse(self, what: str, remedy: str = _DAMAGED) -> NoReturn:
        _refuse(self.file, what, remedy)

    def need(self, num_bytes: int, what: str) -> None:
        if num_bytes > self.end - self.position:
            limit = "bytes" if self.end == self.file_bytes else "bytes of header at most"
            self.refuse(
                f"is truncated or damaged: {what} at byte {self.position} needs {describe(num_bytes)} bytes, "
                f"the file has {self.end} {limit}"
            )

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.pages, self.position)
        self.position += size
        return value

    def count(self, what: str, limit: int, least_bytes: int) -> int:
        """How many things follow, each of at least `least_bytes`."""
        value: int = self.number("Q", what)
        if value > limit:
            self.refuse(f"has {what} {value}; at most {limit} are allowed")
        if value * least_bytes > self.end - self.position:
            self.refuse(
                f"is truncated or damaged: its {what} is {value}, more than its {self.file_bytes} bytes can hold"
            )
        return value

    def raw_string(self, what: str, limit: int) -> bytes:
        length = self.number("Q", f"the length of {what}")
        if length > limit:
            self.refuse(f"has {what} of {length} bytes; at most {limit} are allowed")
        self.need(length, what)
        raw = self.pages[self.position : self.position + length]
        self.position += length
        return raw

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        raw = self.raw_string(what, limit)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self.refuse(f"has {what} that is not UTF-8 ({error})")

    def name(self, what: str) -> str:
        value = self.string(what, MAX_NAME_BYTES)
        if not value or not value.isprintable():
            self.refuse(f"has {what} {describe(value)}, which is empty or unprintable")
        return value

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            if _SCALARS[kind] == "?":
                flag = self.number("B", describe(key))
                if flag > 1:
                    self.refuse(f"has the boolean {describe(key)} = {flag}")
                return bool(flag)
            return self.number(_SCALARS[kind], describe(key))
        if kind == _STRING:
            return self.string(describe(key))
        if kind != _ARRAY:
            self.refuse(f"has the metadata {describe(key)} of type {kind}, which does not exist")
        return self.array(key)

    def array(self, key: str) -> Sequence[Any]:
        kind = self.number("I", f"the element type of {describe(key)}")
        if kind not in _SCALARS and kind != _STRING:
            self.refuse(
                f"has the array {describe(key)} of elements of type {kind}; only numbers and strings are supported"
            )
        code = _SCALARS.get(kind, "")
        size = struct.calcsize("<" + code) if code else 8
        count = self.count(f"length of array {describe(key)}", self.items_left, size)
        self.items_left -= count
        if not code:
            return self.strings(key, count)
        raw = self.pages[self.position : self.position + count * size]
        self.position += count * size
        return array("B" if code == "?" else code, raw)

    def strings(self, key: str, count: int) -> StringArray:
        """Step over `count` strings. The loop is the header's longest: it has no calls but one."""
        start = position = self.position
        unpack_from, pages, last = struct.Struct("<Q").unpack_from, self.pages, self.end - 8
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack_from(pages, position)[0]
        if position > self.end:
            self.refuse(
                f"is truncated or damaged: the strings of {describe(key)} do not fit its {self.file_bytes} bytes"
            )
        self.position = position
        return StringArray(key, self.file, start, position, count)

    def tensor(self, index: int, alignment: int) -> tuple[str, torch.dtype, tuple[int, ...], str | None, int]:
        name = self.name(f"the name of tensor {index}")
        rank = self.number("I", f"the rank of tensor {describe(name)}")
        if not 1 <= rank <= MAX_RANK:
            self.refuse(f"describes tensor {describe(name)} with {rank} dimensions; allowed are 1 to {MAX_RANK}")
        self.need(8 * rank, f"the shape of tensor {describe(name)}")
        sizes = struct.unpack_from(f"<{rank}Q", self.pages, self.position)
        self.position += 8 * rank
        if not all(sizes) or prod(sizes) > MAX_ELEMENTS:
            self.refuse(
                f"describes tensor {describe(name)} with sizes {list(sizes)}; allowed are 1 to {MAX_ELEMENTS} elements"
            )
        kind = self.number("I", f"the type of tensor {describe(name)}")
        offset = self.number("Q", f"the offset of tensor {describe(name)}")
        if offset % alignment:
            self.refuse(
                f"puts tensor {describe(name)} at offset {offset}, which is no multiple of the alignment {alignment}"
            )
        shape = tuple(reversed(sizes))
        if kind in PLAIN_TYPES:
            return name, PLAIN_TYPES[kind], shape, None, offset
        block = BLOCK_TYPES.get(kind)
        if block is None:
            known = ", ".join(("F32", "F16", "BF16", *(each.name for each in BLOCK_TYPES.values())))
            self.refuse(
                f"holds tensor {describe(name)} in type {_UNSUPPORTED.get(kind, 'of unknown name')} ({kind}), which is "
                "not supported",
                f"Supported: {known}.",
            )
        if shape[-1] % block.num_elements:
            self.refuse(
                f"describes tensor {describe(name)} with rows of {shape[-1]} elements; {block.name} needs a multiple "
                f"of {block.num_elements}"
            )
        packed = (*shape[:-1], shape[-1] // block.num_elements * block.num_bytes)
        return name, torch.uint8, packed, block.name, offset


def _refuse(file: Path, what: str, remedy: str = _DAMAGED) -> NoReturn:
    raise CheckpointError(f"{file} {what}.", remedy=remedy)
