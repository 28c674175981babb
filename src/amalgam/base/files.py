"""Files and folders that appear complete or not at all.

In: a path and its content. Out: the file or the folder. Must never know what is in it.

What is new is written beside its place, under a name of its own and with a lock, flushed to the disk, and then renamed:
a reader, and a machine that loses power, sees the old or the new. What fails leaves nothing behind; what a killed
process has left is removed by the next one that writes there.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from amalgam.base.locks import FileLock, create_locked, remove_abandoned
from amalgam.errors import CheckpointError, ConflictError

logger = logging.getLogger("amalgam.files")


class NewFile:
    """A temporary file, locked as long as it is open, that gets its name with `commit`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor

    def write(self, data: bytes | memoryview, offset: int = 0) -> None:
        """Put bytes at `offset`. Thread-safe.

        Raises:
            OSError: there is no room.
        """
        data = memoryview(data).cast("B")
        while data:  # one call writes 2 GiB at most
            written = os.pwrite(self._descriptor, data, offset)
            data = data[written:]
            offset += written

    def commit(self, target: Path) -> None:
        """Flush it to the disk and give it its name; replaces a file of that name.

        Raises:
            OSError: there is no room.
        """
        os.fsync(self._descriptor)
        self._path.replace(target)
        try:
            _flush_folder(target.parent)
        except OSError as error:  # not readable, or on a network: the file is there all the same
            logger.debug("%s cannot be flushed to the disk: %s", target.parent, error)


def _flush_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def new_file(folder: Path, prefix: str, suffix: str) -> Iterator[NewFile]:
    """A file that leaves nothing behind unless it is committed; `folder` is made if absent.

    Args:
        prefix, suffix: of the temporary name; files of the same that killed processes have left are removed.

    Raises:
        OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder, prefix, suffix)
    path, descriptor = create_locked(folder, prefix, suffix)
    try:
        yield NewFile(path, descriptor)
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)  # which unlocks: nobody may take the file for abandoned before


def replace_file(target: Path, content: str | bytes) -> Path:
    """Write a file, in place of one of that name; its folder is made if absent.

    Raises:
        OSError: it cannot be written.
    """
    with new_file(target.parent, f".{target.name}.", ".partial") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.commit(target)
    return target


@contextmanager
def resumable_folder(
    path: Path, is_worth_keeping: Callable[[Path], bool], lock: FileLock | None = None
) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends. What a block has made before it failed, or its
    process was killed, is there again at the next attempt.

    Its name is taken for nothing whole: `.NAME.partial`.

    Args:
        is_worth_keeping: whether a failed attempt has left anything of use in the folder; else it is removed.
        lock: of `path`, held by the caller; None: it is taken here.

    Raises:
        CheckpointError: `path` exists and is not an empty folder, or cannot be written.
        ConflictError: another process is making it.
    """
    with _locked(path, lock) as held:
        partial = partial_folder(held.target)
        try:
            with writing(path):
                if partial.exists() and not is_worth_keeping(partial):
                    shutil.rmtree(partial)
                partial.mkdir(parents=True, exist_ok=True)
            yield partial
            with writing(path):
                partial.rename(path.absolute())
        finally:
            if partial.exists() and not is_worth_keeping(partial):
                shutil.rmtree(partial, ignore_errors=True)


def partial_folder(path: Path) -> Path:
    """Where `resumable_folder` makes a folder."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def _locked(path: Path, lock: FileLock | None) -> Iterator[FileLock]:
    """The lock of a folder that is not there yet."""
    path = path.absolute()
    if lock is None:
        with FileLock(path) as own:
            with writing(path):
                _check_takes_files(path.parent)
                is_free = own.try_acquire()
            if not is_free:
                raise ConflictError(
                    f"{path} is being written by {own.holder}.", remedy="Wait for it or choose another folder."
                )
            with _locked(path, own) as held:
                yield held
        return
    check_free(path)
    yield lock


def check_free(path: Path) -> None:
    """Raise CheckpointError if a folder cannot be made there: something is, and it is not an empty folder.

    To be asked before anything that takes long, such as a download. What is there may be the checkpoint that is read,
    or the only copy of another one, so that nobody is told to remove it.
    """
    with writing(path):
        is_taken = path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir())))
    if is_taken:
        raise CheckpointError(f"{path} exists already.", remedy="Name a folder that does not exist, or an empty one.")
    with writing(path):
        _check_takes_files(path.absolute().parent)


def check_writable(path: Path) -> None:
    """Raise CheckpointError if no file can be written there, as far as can be told without one.

    To be asked before work that takes long, and whose result the file is.
    """
    with writing(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        _check_takes_files(path.absolute().parent)


def check_folder_writable(folder: Path) -> None:
    """The same for the files of a folder, which may be there or not."""
    with writing(folder):
        _check_takes_files(folder.absolute())


def _check_takes_files(folder: Path) -> None:
    """Raise OSError if a folder, made if absent, can hold no new file."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: in place of an OSError; names `path`.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}).", remedy="Check the path and permissions.") from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Raises:
        CheckpointError: in place of an OSError; names `path`.
    """
    try:
        yield
    except OSError as error:
        reason = _first_reason(error) if isinstance(error, shutil.Error) else str(error)
        raise CheckpointError(f"{path} cannot be written ({reason}).", remedy="Check space and permissions.") from error


def _first_reason(error: shutil.Error) -> str:
    """Of the files that could not be copied: it has a list of (file, copy, reason) for people to read."""
    match error.args:
        case ([(_, copy, reason), *others],):
            return f"{copy}: {reason}" + (f"; and {len(others)} more" if others else "")
    return str(error)
