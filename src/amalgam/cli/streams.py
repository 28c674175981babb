"""Standard input, output and error that may be closed, full, or unable to show a text.

In: the process's streams. Out: the same, guarded while a verb runs: characters that an encoding lacks are escaped, a
standard output that takes nothing more is one exception, and messages that nobody can read stop nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

_BROKEN_PIPE = 141  # what a shell reports for a program that the closed pipe has killed


class OutputError(Exception):
    """Standard output takes nothing more. No AmalgamError: a verb that goes on after mistakes has to end here."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"Cannot write to standard output: {error.strerror or error}.")
        self.is_reader_gone = isinstance(error, BrokenPipeError)
        self.exit_code = _BROKEN_PIPE if self.is_reader_gone else 1


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """Guards the three streams, and writes out what they hold at the end.

    Raises:
        OutputError: standard output takes nothing more; here or wherever something is written.
    """
    _open_closed()
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = out = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = err = sys.stderr or os.fdopen(2, "w", closefd=False)
    with _escaping(out), _escaping(err):
        sys.stdout, sys.stderr = cast(TextIO, _Output(out)), cast(TextIO, _Messages(err))
        try:
            yield
            sys.stdout.flush()
        except OutputError:
            _discard(out)
            raise
        finally:
            try:
                err.flush()
            except (OSError, ValueError):
                _discard(err)
            sys.stdout, sys.stderr = out, err


class _Guarded:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Output(_Guarded):
    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputError(error) from None

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputError(error) from None


class _Messages(_Guarded):
    """Those that nobody can read are dropped: there is no place to say so."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):  # the latter once it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _open_closed() -> None:
    """Put something in the places of closed streams, or the next file that is opened would be taken for one of them.

    Reading finds the end, writing an output fails, and messages go nowhere.
    """
    for fd, flags in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, flags)  # the lowest number that is free, and all below are taken


@contextlib.contextmanager
def _escaping(stream: TextIO) -> Iterator[None]:
    """`\\u6708` in place of an error for what the stream's encoding lacks."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is None or stream.errors != "strict":
        yield
        return
    reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):  # it writes out what is held; that has failed before
            reconfigure(errors="strict")


def _discard(stream: TextIO) -> None:
    """Let what the stream holds go nowhere, or the interpreter would try once more at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
