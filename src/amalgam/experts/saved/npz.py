"""Arrays in an `.npz` file, texts as arrays of bytes.

In: arrays, or a file's bytes. Out: a file's bytes, or arrays. Must never know what they mean.

numpy's own reader allocates what a header asks for, and evaluates it as Python; ours does neither.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.errors import describe
from amalgam.experts.saved.arrays import ArrayFile

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_IS_ENCRYPTED = 0x1
_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_HEADER_BYTES = 1024
# The header as numpy writes it, keys sorted (numpy.lib.format, version 1.0).
_HEADER = re.compile(
    rb"\{'descr': '([<>|][iuf][1248])', 'fortran_order': (True|False), "
    rb"'shape': \((|\d{1,18},|\d{1,18}(?:, \d{1,18}){1,7})\), \} *\n"
)


class NpzFile(ArrayFile):
    """A file whose arrays are unpacked one by one.

    Raises:
        ValueError: it is no zip file of plain, stored or deflated members of different names, or unpacks to more than
            `max_bytes`. The zip reader of the standard library raises many other things for a damaged file.
    """

    def __init__(self, content: bytes, max_bytes: int) -> None:
        self._zip = zipfile.ZipFile(io.BytesIO(content))
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in self._zip.infolist():
            if member.compress_type not in _COMPRESSIONS or member.flag_bits & _IS_ENCRYPTED:
                raise ValueError(f"{describe(member.filename)} is encrypted, or compressed in an uncommon way")
            if member.filename in self._members:
                raise ValueError(f"it has {describe(member.filename)} twice")
            self._members[member.filename] = member
        if sum(member.file_size for member in self._members.values()) > max_bytes:
            raise ValueError(f"it unpacks to more than {max_bytes} bytes")

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._members

    def header(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        with self._open(name) as file:
            dtype, shape, _ = _read_header(file, name)
        return dtype, shape

    def text(self, name: str, max_bytes: int) -> bytes:
        _, (num_bytes,) = self.header(name)
        if num_bytes > max_bytes:
            raise ValueError(f"{name} takes {num_bytes} bytes")
        return self.read(name, (num_bytes,), "u").tobytes()

    def _load(self, name: str) -> npt.NDArray[Any]:
        with self._open(name) as file:
            dtype, shape, is_fortran = _read_header(file, name)
            num_bytes = math.prod(shape) * dtype.itemsize
            if num_bytes > self._members[f"{name}.npy"].file_size:
                raise ValueError(f"{name} is cut off")
            data = file.read(num_bytes)
            if len(data) != num_bytes or file.read(1):
                raise ValueError(f"{name} has more or fewer bytes than its shape takes")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")

    def _open(self, name: str) -> Any:
        if name not in self:
            raise ValueError(f"it has no {name}")
        return self._zip.open(self._members[f"{name}.npy"])


def write_npz(arrays: Mapping[str, npt.NDArray[Any]], texts: Mapping[str, bytes], *, compress: bool = True) -> bytes:
    """A file's content, which `numpy.load` reads too."""
    buffer = io.BytesIO()
    bytes_of_texts = {name: np.frombuffer(text, np.uint8) for name, text in texts.items()}
    (np.savez_compressed if compress else np.savez)(buffer, allow_pickle=False, **bytes_of_texts, **arrays)
    return buffer.getvalue()


def _read_header(file: Any, name: str) -> tuple[np.dtype[Any], tuple[int, ...], bool]:
    """Type, shape, and whether the first axis runs fastest; `file` is left at the first element."""
    start = file.read(len(_MAGIC) + 2)
    if len(start) == len(_MAGIC) + 2 and start.startswith(_MAGIC):
        (length,) = struct.unpack("<H", start[len(_MAGIC) :])
        found = _HEADER.fullmatch(file.read(length)) if length <= _MAX_HEADER_BYTES else None
        if found is not None:
            shape = tuple(int(size) for size in found[3].replace(b",", b" ").split())
            return np.dtype(found[1].decode()), shape, found[2] == b"True"
    raise ValueError(f"{name} is no plain array of numbers")
