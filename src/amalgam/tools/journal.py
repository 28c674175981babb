"""What is done of a long list of work, kept so that a killed run goes on where it was.

In: finished items, in any order. Out: a file with all of them in order, once there are all. Must never know: what an
item is.

    OUT.partial     {"format": 1, "seed": …, "input": …}    what the run is of
                    ["weights","…"]                         what is known of that later only
                    [17,{…}]                                item 17; each line is appended by one write
                    [3,{…}]
                    [18,{…                                  what a kill has cut is dropped by the next run

`OUT` appears when everything is there, at once, and `OUT.partial` goes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import orjson

from amalgam.base.files import check_writable, new_file, writing
from amalgam.base.locks import FileLock
from amalgam.errors import ConflictError, RequestError, describe

FORMAT = 1
_BEGINNING = b'{"format":'
_SYNC_SECONDS = 1.0  # that a machine which loses power may cost
_CHUNK_BYTES = 2**22


class Journal:
    """The items of one run, in `OUT.partial`. A context: leaving it closes the file.

    Attributes:
        header: what the run was begun with, as `open` was given it then.
        done: the items that are there.
    """

    def __init__(self, output: Path, header: Mapping[str, Any], lock: FileLock, descriptor: int) -> None:
        self.header = dict(header)
        self._output = output
        self._lock = lock
        self._descriptor = descriptor
        self._places: dict[int, tuple[int, int]] = {}  # item → where its JSON begins, and how many bytes it has
        self._end = 0
        self._synced_at = time.monotonic()

    @classmethod
    def open(
        cls, output: Path, identity: Mapping[str, Any], fresh: Mapping[str, Any], seen: Callable[[Any], None]
    ) -> Self:
        """Begin a run, or go on with one.

        Args:
            output: the file that is to be written in the end.
            identity: what makes a run another one: name → value.
            fresh: what else the header of a new run holds.
            seen: takes each item that is there already.

        Raises:
            ConflictError: the output exists, another process writes it, or what is there belongs to another run.
            CheckpointError: it cannot be written.
        """
        check_writable(output)
        partial = partial_of(output)
        lock = FileLock(output)
        with writing(output):
            is_free = lock.try_acquire()
        if not is_free:
            raise ConflictError(f"{str(output)!r} is being written by {lock.holder}.", remedy="Wait for it.")
        try:
            if output.exists():  # who has just finished it held the lock until then
                raise ConflictError(f"{str(output)!r} exists already.", remedy="Name another output.")
            with writing(partial):
                descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o666)
            journal = cls(output, {}, lock, descriptor)
        except BaseException:
            lock.release()
            raise
        try:
            journal._read(partial, seen)
            if journal.header:
                _check_same(journal.header, identity, partial)
            else:
                journal.header |= {"format": FORMAT, **identity, **fresh}
                with writing(partial):
                    os.ftruncate(descriptor, 0)
                journal._end = journal._append(orjson.dumps(journal.header) + b"\n")
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def done(self) -> set[int]:
        return set(self._places)

    def bind(self, name: str, value: str) -> None:
        """One more thing that makes a run another one, and is known late.

        Raises:
            ConflictError: the run was begun with another value.
            CheckpointError: there is no room.
        """
        if name in self.header:
            _check_same(self.header, {name: value}, partial_of(self._output))
            return
        self.header[name] = value
        self._end += self._append(orjson.dumps([name, value]) + b"\n")

    def add(self, item: int, value: Mapping[str, Any]) -> None:
        """Note that an item is finished; it is not lost any more.

        Raises:
            CheckpointError: there is no room.
        """
        head, content = b"[%d," % item, orjson.dumps(value)
        size = self._append(head + content + b"]\n")
        self._places[item] = (self._end + len(head), len(content))
        self._end += size
        if time.monotonic() - self._synced_at >= _SYNC_SECONDS:
            with writing(partial_of(self._output)):
                os.fdatasync(self._descriptor)
            self._synced_at = time.monotonic()

    def finish(self, num_items: int) -> None:
        """All items are there: write the output, a line for each in order, and forget the journal.

        Raises:
            CheckpointError: there is no room.
        """
        with writing(self._output):
            with new_file(self._output.parent, f".{self._output.name}.", ".tmp") as file:
                offset = 0
                for block in self._blocks(num_items):
                    file.write(block, offset)
                    offset += len(block)
                file.commit(self._output)
            partial_of(self._output).unlink(missing_ok=True)

    def close(self) -> None:
        """Harmless when repeated."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.fdatasync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _blocks(self, num_items: int) -> Iterator[bytes]:
        lines: list[bytes] = []
        size = 0
        for item in range(num_items):
            offset, length = self._places[item]
            lines.append(os.pread(self._descriptor, length, offset))
            size += length
            if size >= _CHUNK_BYTES:
                yield b"\n".join(lines) + b"\n"
                lines, size = [], 0
        if lines:
            yield b"\n".join(lines) + b"\n"

    def _append(self, data: bytes) -> int:
        rest = memoryview(data)
        with writing(partial_of(self._output)):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        return len(data)

    def _read(self, partial: Path, seen: Callable[[Any], None]) -> None:
        """Take what an earlier run has left, up to the first line that is not whole."""
        with partial.open("rb") as stream:
            first = stream.readline()
            if not first.endswith(b"\n") and (first.startswith(_BEGINNING) or _BEGINNING.startswith(first)):
                return  # what a kill in the first line leaves
            header = _parsed(first)
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise _foreign(partial)
            self.header, self._end = header, len(first)
            for line in stream:
                record = _parsed(line)
                if record is None:
                    break
                match record:
                    case [str(name), str(value)]:
                        self.header[name] = value
                    case [int(item), dict(value)]:
                        start = line.index(b",") + 1
                        self._places[item] = (self._end + start, len(line) - start - 2)
                        seen(value)
                    case _:
                        raise _foreign(partial)
                self._end += len(line)
        with writing(partial):
            os.ftruncate(self._descriptor, self._end)


def partial_of(output: Path) -> Path:
    """Where the journal of an output stands."""
    return output.with_name(f"{output.name}.partial")


def _parsed(line: bytes) -> Any:
    """The value of a whole line; None: it is cut."""
    if not line.endswith(b"\n"):
        return None
    try:
        return orjson.loads(line)
    except ValueError:
        return None


def _check_same(header: Mapping[str, Any], identity: Mapping[str, Any], partial: Path) -> None:
    other = [name for name, value in identity.items() if header.get(name) != value]
    if other:
        raise ConflictError(
            f"{str(partial)!r} was begun with another {' and '.join(other)}.",
            remedy="Give what it was begun with, or remove it to begin anew.",
        )


def _foreign(partial: Path) -> RequestError:
    return RequestError(
        f"{describe(str(partial))} is no journal of a run.", remedy="Move it away, or name another output."
    )
