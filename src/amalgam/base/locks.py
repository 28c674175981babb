"""Who is at work on a file: locks between processes, and temporary files that are known to be abandoned.

In: paths. Out: locks. Must never know what the files hold.

The system releases a lock when its holder ends, however it ends. So a lock file that merely lies there means nothing,
and what a killed process has left can be told from what a living one is writing. Where a file system has no locks, a
warning says so, everybody goes on without, and nothing is taken for abandoned.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

POLL_SECONDS = 0.2
_MAX_HOLDER_BYTES = 512
_RANDOM_BYTES = 8
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF}
_HELD_BY_ANOTHER = {errno.EWOULDBLOCK, errno.EACCES}

logger = logging.getLogger("amalgam.files")


class FileLock:
    """The right to write `target` (a file or a folder): a lock on `.NAME.lock` beside it, which goes with the release.

    Also between threads of one process. Not reentrant.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.resolve()
        self._path = self.target.with_name(f".{self.target.name}.lock")
        self._descriptor: int | None = None
        self.is_held = False  # False after `try_acquire` too, where the file system has no locks

    def try_acquire(self) -> bool:
        """Take the lock; False if somebody else holds it.

        Raises:
            OSError: there can be no file beside the target.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = self._open()
            try:
                is_free = _lock(descriptor, self._path)
                if is_free is False:
                    os.close(descriptor)
                    return False
                if is_free is None or _is_still(descriptor, self._path):
                    break
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # the holder before us has removed it in between: it locks nobody out any more
        self._descriptor, self.is_held = descriptor, bool(is_free)
        if self.is_held:
            self._sign(descriptor)
        return True

    def acquire(self, wait: Callable[[], None]) -> None:
        """Take the lock when it becomes free.

        Args:
            wait: called several times a second meanwhile; ends the wait by raising.

        Raises:
            OSError: see `try_acquire`.
        """
        while not self.try_acquire():
            wait()
            time.sleep(POLL_SECONDS)

    def release(self) -> None:
        """Let others have it. Harmless when repeated."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        self.is_held = False
        with contextlib.suppress(OSError):
            # While it is locked: whoever waits for it sees that its file is gone, and makes a new one.
            self._path.unlink()
        os.close(descriptor)

    @property
    def holder(self) -> str:
        """Who holds it, as far as that is known: `process 123 on NAME`."""
        try:
            return self._path.read_bytes()[:_MAX_HOLDER_BYTES].decode("ascii", "replace").strip() or "another process"
        except OSError:
            return "another process"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _open(self) -> int:
        try:
            return os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except PermissionError:
            if not self._path.exists():
                raise
            return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)  # another user has left it

    def _sign(self, descriptor: int) -> None:
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode("ascii", "replace"), 0)
        except OSError:  # a full disk, or another user's file: the lock holds without a name
            pass


def create_locked(folder: Path, prefix: str, suffix: str) -> tuple[Path, int]:
    """A new temporary file, locked until its descriptor is closed.

    Raises:
        OSError: it cannot be made.
    """
    while True:
        path = folder / f"{prefix}{secrets.token_hex(_RANDOM_BYTES)}{suffix}"
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)
        # Somebody who cleans up may have come before the lock: then it is theirs, and gone.
        if _lock(descriptor, path) is not False and _is_still(descriptor, path):
            return path, descriptor
        os.close(descriptor)


def remove_abandoned(folder: Path, prefix: str, suffix: str) -> None:
    """Remove the files of `create_locked` and `FileLock` whose makers have ended; never fails."""
    for path in _leftovers(folder, prefix, suffix):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if _lock(descriptor, path):
                    path.unlink()
            finally:
                os.close(descriptor)
        except OSError:  # it has just been renamed, or is not ours to remove
            continue


def _leftovers(folder: Path, prefix: str, suffix: str) -> list[Path]:
    pattern = re.compile(f"{re.escape(prefix)}[0-9a-f]{{8,}}{re.escape(suffix)}")
    try:
        return [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    except OSError:
        return []


def _lock(descriptor: int, path: Path) -> bool | None:
    """Whether the lock is ours now; None where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_BY_ANOTHER:
            return False
        if error.errno in _NO_LOCKS:
            logger.warning("%s: this file system has no locks (%s); going on without.", path.parent, error.strerror)
            return None
        raise
    return True


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the opened file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False
