"""A Unix socket to listen on, in place of a port.

In: a path and permissions. Out: a listening socket, whose file goes with it. Must never know: HTTP.

The file has its permissions before anyone can connect: it is made under another name and renamed into its place, over
one that a killed server has left. A lock beside it keeps two servers from taking each other's.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
from pathlib import Path

from amalgam.base.locks import FileLock
from amalgam.config.server import ServerSettings
from amalgam.errors import ConfigError

MAX_PATH_BYTES = 107  # of sockaddr_un, without the byte at its end
BACKLOG = 2048


class UnixListener(socket.socket):
    """A listening socket that removes its file when it is closed."""

    def __init__(self, path: Path, lock: FileLock) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.path = path
        self._lock = lock
        self._inode: int | None = None

    def put_in_place(self, mode: int) -> None:
        """Listen under the path.

        Raises:
            OSError: it cannot be.
        """
        temporary = self.path.with_name(f".{secrets.token_hex(4)}")
        try:
            self.bind(str(temporary))
            temporary.chmod(mode)
            self.listen(BACKLOG)
            temporary.rename(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._inode = self.path.stat().st_ino

    def close(self) -> None:
        inode, self._inode = self._inode, None
        if inode is not None:
            with contextlib.suppress(OSError):
                if self.path.lstat().st_ino == inode:
                    self.path.unlink()
        self._lock.release()
        super().close()


def listen_unix(settings: ServerSettings) -> UnixListener:
    """
    Raises:
        ConfigError: the path is too long or taken, or its folder cannot be written to.
    """
    path = Path(settings.unix_socket).absolute()
    what = f"Cannot listen on server.unix_socket {str(path)!r}"
    if len(os.fsencode(path)) > MAX_PATH_BYTES or len(os.fsencode(path.parent)) + 10 > MAX_PATH_BYTES:
        raise ConfigError(f"{what}: a socket's path has at most {MAX_PATH_BYTES} bytes.")
    if not path.parent.is_dir():
        raise ConfigError(f"{what}: there is no folder {str(path.parent)!r}.", remedy="Make it first.")
    lock = FileLock(path)
    try:
        if not lock.try_acquire():
            raise ConfigError(f"{what}: {lock.holder} does already.", remedy="Choose another path.")
    except OSError as error:
        raise ConfigError(f"{what}: {error.strerror}.") from None
    try:
        _check_free(path, what)
        listener = UnixListener(path, lock)
        try:
            listener.put_in_place(int(settings.unix_socket_mode, 8))
        except OSError:
            listener.close()
            raise
    except OSError as error:
        lock.release()
        raise ConfigError(f"{what}: {error.strerror}.") from None
    except ConfigError:
        lock.release()
        raise
    return listener


def _check_free(path: Path, what: str) -> None:
    """
    Raises:
        ConfigError: there is another kind of file, or a program without our lock listens there.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{what}: there is a file that is no socket.", remedy="Choose another path, or remove it.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return  # a killed server has left it
    raise ConfigError(f"{what}: another program does already.", remedy="Choose another path.")
