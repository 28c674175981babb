"""The packed cache: a folder with weights in the kernels' own layout, mapped in place of reading and packing them.

In: weights that were loaded, each with a key that names the bytes it came from and the way it was packed. Out: the same
weights in later processes, over the page cache. Must never know: plans, slots.

Each file holds weights of one source and names the checkpoint files that they came from. When one of these has changed
or gone, nothing in the file can be asked for any more, and it is removed; so is one of another version of this
package, and one that is damaged. Nothing in the folder is trusted further than that: whoever can write there can
change the model's values, but never make a product read outside of a file.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from amalgam.base.locks import FileLock
from amalgam.checkpoint.packed_file import PackedFile, PackedFileWriter, new_packed_file, remove_abandoned
from amalgam.checkpoint.shards import Identity, identify
from amalgam.errors import AmalgamError
from amalgam.kernels.backends import ActivationType
from amalgam.kernels.backends.cpu import mapped, panels
from amalgam.kernels.weights import PackedWeight
from amalgam.version import __version__

_NAME_DIGITS = 16
_SUFFIX = ".packed"

logger = logging.getLogger("amalgam.models")


class PackedCache:
    """The files of a cache folder as they were when it was opened.

    A folder that is missing or cannot be read is an empty cache.
    """

    def __init__(self, folder: Path) -> None:
        """Open what is valid and remove what is not."""
        self.folder = folder
        self._entries: dict[str, tuple[PackedFile, Any]] = {}
        self._opened: set[tuple[int, int, int]] = set()  # device, inode, time of change
        remove_abandoned(folder)
        self.open_files()

    def open_files(self) -> None:
        """Offer what other processes have written since it was opened, too."""
        for path in sorted(self.folder.glob("[0-9a-f]" * _NAME_DIGITS + _SUFFIX)):
            self.open_file(path)

    def lock(self, sources: Sequence[Identity]) -> FileLock:
        """What a process holds while it writes weights whose bytes come from these files."""
        return FileLock(self.folder / key_of(sources)[:_NAME_DIGITS])

    def find(self, key: str, shape: tuple[int, ...], activation: ActivationType | None) -> PackedWeight | None:
        """A mapped weight, None if it is not there.

        Args:
            key: as it was added.
            shape: the shape that it must have.
            activation: see `Backend.prepare`; None for a weight that is not multiplied.
        """
        if key not in self._entries:
            return None
        file, entry = self._entries[key]
        try:
            weight = mapped.restore(entry, file.runs(entry["offset"], entry["runs"]), activation or "int8")
            if weight.shape != shape:
                raise ValueError(f"its shape is {weight.shape} instead of {shape}")
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            logger.warning("packed cache: a weight in %s is not usable: %s", self.folder, error)
            return None
        return replace(weight, is_mapped=True)

    @contextmanager
    def new_file(self, sources: Sequence[Identity]) -> Iterator[NewFile]:
        """A file to add weights to, whose bytes come from these files.

        Raises:
            OSError: the folder cannot be written to.
        """
        with new_packed_file(self.folder) as writer:
            yield NewFile(self, writer, sources)

    def open_file(self, path: Path) -> None:
        """Offer a file's weights, or remove it if there are none to be had; never fails."""
        try:
            status = path.stat()
            identity = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if identity not in self._opened:
                self._entries |= _read_entries(path)
                self._opened.add(identity)
        except OSError as error:
            logger.warning("packed cache: %s cannot be read: %s", path, error)
        except (AmalgamError, ValueError, KeyError, TypeError) as error:
            logger.info("packed cache: removing %s: %s", path, error)
            try:
                path.unlink()
            except OSError as problem:
                logger.warning("packed cache: %s is of no use and cannot be removed: %s", path, problem)


class NewFile:
    """A file of the cache that is being written."""

    def __init__(self, cache: PackedCache, writer: PackedFileWriter, sources: Sequence[Identity]) -> None:
        self._cache = cache
        self._writer = writer
        self._sources = sources
        self._weights: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()

    def add(self, key: str, weight: PackedWeight) -> bool:
        """Write a weight; False if its layout cannot be mapped. Thread-safe.

        Raises:
            OSError: there is no room.
        """
        if not mapped.can_be_mapped(weight):
            return False
        runs = mapped.runs(weight)
        entry = {**mapped.describe(weight), "offset": self._writer.append(runs), "runs": [run.numel() for run in runs]}
        with self._lock:
            self._weights[key] = entry
        return True

    def commit(self) -> None:
        """Finish the file; its weights can then be found.

        Raises:
            OSError: there is no room.
        """
        if not self._weights:
            return
        digest = hashlib.sha256("".join(sorted(self._weights)).encode())
        path = self._cache.folder / f"{digest.hexdigest()[:_NAME_DIGITS]}{_SUFFIX}"
        self._writer.commit(path, {"made_by": made_by(), "sources": self._sources, "weights": self._weights})
        self._cache.open_file(path)


def made_by() -> Mapping[str, Any]:
    """What another process must agree in to use a file: the same checkpoint could become other bytes."""
    return {"amalgam": __version__, "panels": panels.layout_version(), "byteorder": sys.byteorder}


def key_of(*parts: Any) -> str:
    """A key from values whose `repr` tells them apart in every process."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _read_entries(path: Path) -> dict[str, tuple[PackedFile, Any]]:
    """Key → file and description of each weight of a file.

    Raises:
        OSError: it cannot be read.
        CheckpointError, ValueError, KeyError, TypeError: it is damaged or of another version, or a source has changed.
    """
    file = PackedFile(path)
    if file.index["made_by"] != made_by():
        raise ValueError(f"it was made by {file.index['made_by']}")
    for name, *state in file.index["sources"]:
        if identify(Path(name)) != (name, *state):
            raise ValueError(f"{name} has changed")
    weights = file.index["weights"]
    if not isinstance(weights, dict):
        raise TypeError("its weights are no object")
    return {key: (file, entry) for key, entry in weights.items()}
