"""A file of our own whose bytes are used where they lie: runs of bytes that are mapped, and an index of what they are.

In: runs of bytes from any number of threads, and an index; later a path. Out: a file that appears complete or not at
all; later its index and its pages. Must never know what the runs are.

Layout; numbers are 64 bits, lowest byte first:

    0        8               16              24               56    64                           index start
    | magic | index start u64 | index bytes u64 | SHA-256 of index | 0 | runs, each from a 64-byte boundary | JSON |

The digest tells damage from a file of ours; it keeps no secrets. Of a file that somebody truncates while it is mapped,
pages become zeros: `amalgam.base.mapping` tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amalgam.base import locks
from amalgam.base.files import NewFile, new_file
from amalgam.base.mapping import MappedFile
from amalgam.base.strict_json import parse_foreign_json
from amalgam.errors import CheckpointError, describe

MAGIC = b"AMALGAM\x01"
ALIGNMENT = 64
MAX_INDEX_BYTES = 64 * 2**20
_TEMPORARY = (".packed-", ".tmp")  # random digits between
_LOCK = (".", ".lock")  # digits between that name what is written


class PackedFile:
    """An opened file.

    Attributes:
        index: what `PackedFileWriter.commit` was given.
    """

    def __init__(self, path: Path) -> None:
        """Map a file and read its index; no run is touched.

        Raises:
            CheckpointError: it is damaged, or none of ours.
            OSError: it cannot be opened or mapped.
        """
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(ALIGNMENT)
            start, nbytes = (int.from_bytes(head[at : at + 8], "little") for at in (8, 16))
            if head[: len(MAGIC)] != MAGIC:
                raise CheckpointError(f"{path} does not begin like a packed file.", remedy="Remove it.")
            if len(head) < ALIGNMENT or start < ALIGNMENT or nbytes > MAX_INDEX_BYTES or start + nbytes != size:
                raise CheckpointError(
                    f"{path} is truncated: it has {size} bytes, and an index of {nbytes} at byte {start}."
                )
            stream.seek(start)
            raw = stream.read(nbytes)
            if hashlib.sha256(raw).digest() != head[24:56]:
                raise CheckpointError(f"{path} has a damaged index.")
            index = parse_foreign_json(raw, f"The index of {path}")
            if not isinstance(index, dict):
                raise CheckpointError(f"{path} has the index {describe(index)}.")
            self.index: Mapping[str, Any] = index
            pages = MappedFile(stream.fileno(), size, is_writable=False).pages
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch knows no tensors that must not be written; nobody writes to weights
            self._memory = torch.frombuffer(pages, dtype=torch.uint8)
        self._end = start

    def runs(self, offset: Any, sizes: Any) -> list[Tensor]:
        """Runs of bytes as `append` was given them: uint8 `[bytes]` each, which keep the file mapped.

        Raises:
            ValueError: they do not lie in the file.
        """
        found = []
        if not isinstance(sizes, list) or not all(type(value) is int and value >= 0 for value in (offset, *sizes)):
            raise ValueError(f"runs of {describe(sizes)} bytes at {describe(offset)}")
        for size in sizes:
            if offset < ALIGNMENT or offset % ALIGNMENT or offset + size > self._end:
                raise ValueError(f"a run of {size} bytes at {offset}")
            found.append(self._memory[offset : offset + size])
            offset = _aligned(offset + size)
        return found


class PackedFileWriter:
    """Writes runs of bytes from any number of threads, and at the end the index of what they are."""

    def __init__(self, file: NewFile) -> None:
        self._file = file
        self._end = ALIGNMENT
        self._ends = threading.Lock()

    def append(self, runs: Sequence[Tensor]) -> int:
        """Write runs of bytes (uint8 `[bytes]`) one after the other; returns where the first begins. Thread-safe.

        Raises:
            OSError: there is no room.
        """
        with self._ends:
            start = self._end
            for run in runs:
                self._end = _aligned(self._end + run.numel())
        offset = start
        for run in runs:
            self._file.write(run.numpy().data, offset)
            offset = _aligned(offset + run.numel())
        return start

    def commit(self, path: Path, index: Mapping[str, Any]) -> None:
        """Finish the file, flush it to the disk and give it its name; replaces a file of that name.

        Raises:
            OSError: there is no room.
        """
        raw = json.dumps(index, separators=(",", ":")).encode()
        self._file.write(raw, self._end)
        head = MAGIC + self._end.to_bytes(8, "little") + len(raw).to_bytes(8, "little") + hashlib.sha256(raw).digest()
        self._file.write(head.ljust(ALIGNMENT, b"\0"))
        self._file.commit(path)


@contextmanager
def new_packed_file(folder: Path) -> Iterator[PackedFileWriter]:
    """A writer that leaves nothing behind unless it commits; `folder` is created if it is missing."""
    with new_file(folder, *_TEMPORARY) as file:
        yield PackedFileWriter(file)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and the locks of processes that ended while they wrote."""
    locks.remove_abandoned(folder, *_TEMPORARY)
    locks.remove_abandoned(folder, *_LOCK)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
