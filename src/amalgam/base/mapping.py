"""Files as memory: one that shrinks while it is mapped is an error, and not the process's end.

In: an open file. Out: its pages, and whether all that were touched were the file's. Must never know what is in them.

Touching a page that a file has no more, or that the disk does not give, raises SIGBUS. The extension puts zeros in its
place and notes it: who reads mapped pages asks `has_lost` behind it. Without the extension the signal ends the process.
"""

from __future__ import annotations

import mmap
import sys
import weakref
from typing import Self

try:
    from amalgam import _mapping
except ImportError:  # built without a C++ compiler
    _mapping = None  # type: ignore[assignment]

# Without it, Linux refuses to map a file larger than the machine's memory writably, although we never write.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class Watch:
    """Memory that is watched until its owner is gone.

    Args:
        pages: of a mapped file; anything with a buffer.
        owner: what keeps them mapped, and lives no longer than they are; anything that can be referred to weakly. Other
            memory may be where they were.
    """

    def __init__(self, pages: object, owner: object) -> None:
        self._range: int | None = None
        self._had_lost = False
        if _mapping is not None:
            self._range = _mapping.watch(pages)
            weakref.finalize(owner, self.end).atexit = False

    @property
    def has_lost(self) -> bool:
        """Whether pages were touched that the file did not have any more."""
        return self._had_lost or (self._range is not None and _mapping.has_lost(self._range))

    def end(self) -> None:
        """Watch no more, though the owner may be there still."""
        if self._range is not None:
            self._had_lost = _mapping.has_lost(self._range)
            ended, self._range = self._range, None
            _mapping.forget(ended)


class MappedFile:
    """A file, mapped privately: what is written to the pages does not reach it.

    As a context, it is unmapped at the end; then no view may be left.

    Attributes:
        pages: the mapping; lives as long as it, or a view of it, is in use.

    Raises:
        OSError: it cannot be mapped.
    """

    def __init__(self, descriptor: int, nbytes: int, *, is_writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        self.pages = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=protection)
        self._watch = Watch(self.pages, self.pages)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.end()
        self.pages.close()

    @property
    def has_lost(self) -> bool:
        """Whether pages were touched that the file did not have any more: they are zeros from there on."""
        return self._watch.has_lost


def num_lost() -> int:
    """How often a page was touched that its file did not have any more, in the whole process."""
    return 0 if _mapping is None else _mapping.num_lost()


def has_lost_at(address: int) -> bool:
    """Whether the mapping that an address lies in has lost pages; False where nothing is watched."""
    return _mapping is not None and _mapping.has_lost_at(address)
