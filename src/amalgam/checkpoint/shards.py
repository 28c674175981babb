"""One weight file each: what is in it, and its tensors.

In: a safetensors or `.bin` file (GGUF: `checkpoint.gguf`). Out: `TensorEntry`s and CPU tensors that share the file's
pages. Must never know how files are grouped into a checkpoint.

A view is handed out only while the file is the one that was opened, and `check` tells behind the reading whether it
still was: of a file that is rewritten or truncated meanwhile nothing is used. Replace a checkpoint's files by renaming
new ones into place.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import NoReturn, Protocol

import torch

from amalgam.base.mapping import MappedFile, Watch
from amalgam.checkpoint.safetensors_header import DTYPES, TensorEntry, read_header
from amalgam.errors import CheckpointError, describe

Identity = tuple[str, int, int, int]
MAX_PICKLE_BYTES = 64 * 2**20
SMALL_BYTES = 2**16
_ZIP_MAGIC = b"PK\x03\x04"


class Shard(Protocol):
    """A weight file, described when constructed and read on demand by any number of threads."""

    file: Path
    identity: Identity
    entries: list[TensorEntry]

    def read(self, entry: TensorEntry) -> torch.Tensor: ...
    def check(self) -> None: ...
    def release(self, entry: TensorEntry) -> None: ...
    def close(self) -> None: ...


def identify(file: Path, status: os.stat_result | None = None) -> Identity:
    """(path, mtime in ns, bytes, inode) of a file as it is now.

    Raises:
        CheckpointError: the file is gone.
    """
    try:
        status = status or file.stat()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}).", remedy="Put the file back.") from error
    return str(file), status.st_mtime_ns, status.st_size, status.st_ino


def check_unchanged(opened: Identity, now: Identity) -> None:
    """Raise CheckpointError unless a file is still the one that was opened."""
    if now != opened:
        raise CheckpointError(
            f"{opened[0]} has changed since it was opened: it had {opened[2]} bytes and now has {now[2]}.",
            remedy="Load the checkpoint again.",
        )


def check_read(opened: Identity, *, has_lost: bool) -> None:
    """Raise CheckpointError unless what has been read of a mapped file was that of the file that was opened."""
    check_unchanged(opened, identify(Path(opened[0])))
    if has_lost:
        raise CheckpointError(
            f"{opened[0]} cannot be read: the disk does not give all of its pages.",
            remedy="The system's log has the cause. Load the checkpoint from another disk.",
        )


class MappedShard:
    """A file of raw tensors, mapped privately when first read: writing to a view does not reach the file.

    Reads any entry that lies within the file, so also a part of a tensor. A small one is copied out of the file,
    because touching a mapped page that is not in memory brings in megabytes around it.
    """

    def __init__(self, file: Path, identity: Identity, entries: list[TensorEntry]) -> None:
        self.file = file
        self.identity = identity
        self.entries = entries
        self._map: MappedFile | None = None
        self._lock = threading.Lock()

    def read(self, entry: TensorEntry) -> torch.Tensor:
        check_unchanged(self.identity, identify(self.file))
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        assert entry.offset is not None
        if entry.nbytes <= SMALL_BYTES:
            return torch.frombuffer(self._copied(entry.offset, entry.nbytes), dtype=entry.dtype).view(entry.shape)
        pages = self._mapped().pages
        if entry.offset % entry.dtype.itemsize:  # kernels may fault on unaligned elements
            raw = bytearray(pages[entry.offset : entry.offset + entry.nbytes])
            return torch.frombuffer(raw, dtype=entry.dtype).view(entry.shape)
        count = entry.nbytes // entry.dtype.itemsize
        return torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=entry.offset).view(entry.shape)

    def check(self) -> None:
        mapped = self._map
        check_read(self.identity, has_lost=mapped is not None and mapped.has_lost)

    def release(self, entry: TensorEntry) -> None:
        assert entry.offset is not None
        pages = None if (mapped := self._map) is None else mapped.pages
        first = -(-entry.offset // mmap.PAGESIZE) * mmap.PAGESIZE  # pages shared with a neighbour stay
        last = (entry.offset + entry.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if pages is not None and last > first:
            pages.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        with self._lock:
            self._map = None  # unmapped when the last view is gone

    def _copied(self, offset: int, nbytes: int) -> bytearray:
        with self._opened() as stream:
            stream.seek(offset)
            raw = bytearray(stream.read(nbytes))
        if len(raw) < nbytes:  # shortened since
            check_unchanged(self.identity, identify(self.file))
        return raw

    def _mapped(self) -> MappedFile:
        with self._lock:
            if self._map is None:
                with self._opened() as stream:
                    self._map = MappedFile(stream.fileno(), self.identity[2], is_writable=True)
            return self._map

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        try:
            with self.file.open("rb", buffering=0) as stream:
                check_unchanged(self.identity, identify(self.file, os.fstat(stream.fileno())))
                yield stream
        except OSError as error:
            raise CheckpointError(
                f"{self.file} cannot be read ({error}).", remedy="Check its permissions and `ulimit -v`."
            ) from error


class SafetensorsShard(MappedShard):
    """A safetensors file."""

    def __init__(self, file: Path) -> None:
        identity = identify(file)  # before the header, so that a change in between is noticed
        super().__init__(file, identity, read_header(file))


class PickleShard:
    """A zip-based `.bin` of torch: a state dict whose pickle may name nothing but tensors."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.identity = identify(file)
        self._tensors: dict[str, torch.Tensor] | None = None
        self._watches: list[Watch] = []
        self._lock = threading.Lock()
        self.entries = [
            TensorEntry(name, tensor.dtype, tuple(tensor.shape), file, None) for name, tensor in self._loaded().items()
        ]

    def read(self, entry: TensorEntry) -> torch.Tensor:
        check_unchanged(self.identity, identify(self.file))
        return self._loaded()[entry.name]

    @property
    def has_lost(self) -> bool:
        """Whether pages that were read were not there any more."""
        return any(watch.has_lost for watch in self._watches)

    def check(self) -> None:
        check_read(self.identity, has_lost=self.has_lost)

    def release(self, entry: TensorEntry) -> None:
        """Nothing: torch owns the mapping."""

    def close(self) -> None:
        with self._lock:
            self._tensors = None

    def _loaded(self) -> dict[str, torch.Tensor]:
        with self._lock:
            if self._tensors is None:
                self._tensors = _load_state_dict(self.file)
                storages = {storage.data_ptr(): storage for storage in map(_bytes_of, self._tensors.values())}
                watched = (storage for storage in storages.values() if storage.numel())
                self._watches = [Watch(storage.numpy(), storage.untyped_storage()) for storage in watched]
            return self._tensors


def _load_state_dict(file: Path) -> dict[str, torch.Tensor]:
    def refuse(what: str, cause: Exception | None = None) -> NoReturn:
        raise CheckpointError(
            f"{file} {what}.", remedy="Download it from a source that you trust, or convert it to safetensors."
        ) from cause

    try:
        with file.open("rb") as stream:
            if stream.read(len(_ZIP_MAGIC)) != _ZIP_MAGIC:
                refuse("is not a zip-based torch file; bare pickles are never opened")
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                if record.compress_type != zipfile.ZIP_STORED:
                    refuse(f"holds the compressed record {describe(record.filename)}, which a state dict never has")
                if record.filename.endswith(".pkl") and record.file_size > MAX_PICKLE_BYTES:
                    refuse(f"holds a pickle of {record.file_size} bytes; at most {MAX_PICKLE_BYTES} are allowed")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except OSError as error:
        refuse(f"cannot be read ({error})", error)
    except Exception as error:  # the unpickler raises whatever the damaged bytes lead it into
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            refuse(f"pickles {describe(name[1])}, which is no tensor; nothing of it was run", error)
        refuse(f"is damaged ({type(error).__name__})", error)

    if not isinstance(state, dict):
        refuse(f"holds a {type(state).__name__} instead of a state dict")
    for name, tensor in state.items():
        if not isinstance(name, str) or not name or not name.isprintable():
            refuse(f"holds the key {describe(name)}, which is no tensor name")
        if not isinstance(tensor, torch.Tensor):
            refuse(f"holds {describe(tensor)} under {describe(name)}; only tensors are allowed in a state dict")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
            refuse(f"holds {describe(name)} as {tensor.dtype}, {tensor.layout} on {tensor.device}, which is not served")
        if tensor.nbytes > tensor.untyped_storage().nbytes():  # stride 0: a few bytes would become any number
            refuse(f"stores fewer bytes of {describe(name)} than its shape {tuple(tensor.shape)} takes")
    return {name: tensor.detach() for name, tensor in state.items()}


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage, uint8 `[bytes]`."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
