"""Arrays out of an `.npz` file that somebody else may have made.

In: a file's bytes, and what each array should be. Out: arrays. Must never know what they mean.

What the file claims is held against what is expected before anything is unpacked, so that a small file cannot take
much memory. numpy's own reader allocates what a header asks for, and evaluates it as Python.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from amalgam.errors import describe

_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_IS_ENCRYPTED = 0x1
_MAGIC = b"\x93NUMPY\x01\x00"
_MAX_HEADER_BYTES = 1024
# The header as numpy writes it, keys sorted (numpy.lib.format, version 1.0).
_HEADER = re.compile(
    rb"\{'descr': '([<>|][iuf][1248])', 'fortran_order': (True|False), "
    rb"'shape': \((|\d{1,18},|\d{1,18}(?:, \d{1,18}){1,7})\), \} *\n"
)


class ArrayFile:
    """The arrays of one file, read one by one.

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

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the file claims."""
        with self._open(name) as file:
            return _read_header(file, name)[1]

    def read(self, name: str, shape: Sequence[int], kinds: str) -> npt.NDArray[Any]:
        """
        Args:
            shape: what it must be.
            kinds: what its type may be, as numpy calls them: `i`, `u`, `f`.

        Raises:
            ValueError: it is absent, or something else.
        """
        with self._open(name) as file:
            dtype, found, is_fortran = _read_header(file, name)
            if found != tuple(shape) or dtype.kind not in kinds:
                raise ValueError(f"{name} has shape {found} and type {dtype}, not {tuple(shape)}")
            num_bytes = math.prod(found) * dtype.itemsize
            if num_bytes > self._members[f"{name}.npy"].file_size:
                raise ValueError(f"{name} is cut off")
            data = file.read(num_bytes)
            if len(data) != num_bytes or file.read(1):
                raise ValueError(f"{name} has more or fewer bytes than its shape takes")
        array = np.frombuffer(data, dtype)
        return array.reshape(found, order="F" if is_fortran else "C")

    def _open(self, name: str) -> Any:
        if name not in self:
            raise ValueError(f"it has no {name}")
        return self._zip.open(self._members[f"{name}.npy"])


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
