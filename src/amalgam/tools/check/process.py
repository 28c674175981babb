"""A server's process on this machine, as /proc shows it.

In: a port, or the number of a process. Out: memory, processor time, descriptors, folders, how it ended. Must never know
what the process does. Whatever is in another machine or another process namespace is not there.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import select
import struct
from pathlib import Path

_PROC = Path("/proc")
_LISTEN = "0A"
_TICKS = os.sysconf("SC_CLK_TCK")
# linux/pidfd.h: struct pidfd_info, and the ioctl that fills it; it tells how a process ended from Linux 6.15 on.
_PIDFD_INFO_BYTES = 64
_PIDFD_GET_INFO = 0xC000FF0B | _PIDFD_INFO_BYTES << 16
_PIDFD_INFO_EXIT = 1 << 3
_EXIT_CODE_OFFSET = 60


def listener(port: int) -> int | None:
    """The process that listens on a TCP port; of several the first one."""
    sockets = _listening(port)
    for pid in sorted(int(path.name) for path in _PROC.iterdir() if path.name.isdecimal()):
        if sockets & _sockets(pid):
            return pid
    return None


def listens(pid: int, port: int) -> bool:
    """Whether a process, or a child of it, listens on a TCP port."""
    sockets = _listening(port)
    return any(sockets & _sockets(member) for member in family(pid))


def _listening(port: int) -> set[str]:
    """Inodes of the sockets that listen on a port."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in _text(_PROC / "net" / name).splitlines()[1:]:
            cells = line.split()
            if cells[3] == _LISTEN and int(cells[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{cells[9]}]")
    return found


def _sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):
        for path in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(os.readlink(path))
    return found


def is_there(pid: int) -> bool:
    return (_PROC / str(pid)).is_dir()


def family(pid: int) -> list[int]:
    """A process and all of its descendants."""
    members = [pid]
    for member in members:
        for thread in _names(_PROC / str(member) / "task"):
            children = _text(_PROC / str(member) / "task" / thread / "children").split()
            members += [int(child) for child in children if int(child) not in members]
    return members


def name_of(pid: int) -> str:
    return _text(_PROC / str(pid) / "comm").strip()


def resident_bytes(pid: int) -> int:
    """Of the process and its descendants; pages that they share count for each."""
    pages = (_text(_PROC / str(member) / "statm").split() for member in family(pid))
    return sum(int(cells[1]) for cells in pages if len(cells) > 1) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Processor time of the process and its descendants."""
    return sum(_cpu_ticks(member) for member in family(pid)) / _TICKS


def _cpu_ticks(pid: int) -> int:
    cells = _text(_PROC / str(pid) / "stat").rpartition(")")[2].split()
    return int(cells[11]) + int(cells[12]) if len(cells) > 12 else 0


def descriptors(pid: int) -> tuple[int, int] | None:
    """Open ones, and the most that the process may have; None: it is another user's."""
    try:
        count = len(list((_PROC / str(pid) / "fd").iterdir()))
    except OSError:
        return None
    for line in _text(_PROC / str(pid) / "limits").splitlines():
        if line.startswith("Max open files"):
            limit = line.split()[3]
            return count, int(limit) if limit.isdecimal() else 2**63 - 1
    return None


def working_folder(pid: int) -> Path | None:
    try:
        return Path(os.readlink(_PROC / str(pid) / "cwd"))
    except OSError:
        return None


class Watched:
    """A process whose end is waited for, child of ours or not.

    Raises:
        OSError: there is none of this number.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descriptor = os.pidfd_open(pid)

    def send(self, signal: int) -> None:
        os.kill(self._pid, signal)

    @property
    def has_ended(self) -> bool:
        return bool(select.select([self._descriptor], [], [], 0)[0])

    async def wait(self, seconds: float) -> None:
        """Until it has ended, or for so long."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._descriptor, ended.set)
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(self._descriptor)

    def exit_code(self) -> int | None:
        """As a shell says it; None: the system does not tell others than the parent."""
        status = self._reaped_status()
        return None if status is None else os.waitstatus_to_exitcode(status)

    def _reaped_status(self) -> int | None:
        cells = _text(_PROC / str(self._pid) / "stat").rpartition(")")[2].split()
        if cells and cells[0] == "Z" and len(cells) > 49:  # nobody has asked for its end yet
            return int(cells[49])
        info = array.array("B", struct.pack("=Q", _PIDFD_INFO_EXIT) + bytes(_PIDFD_INFO_BYTES - 8))
        try:
            fcntl.ioctl(self._descriptor, _PIDFD_GET_INFO, info)
        except OSError:
            return None
        [mask] = struct.unpack_from("=Q", info)
        [code] = struct.unpack_from("=i", info, _EXIT_CODE_OFFSET)
        return int(code) if mask & _PIDFD_INFO_EXIT else None

    def close(self) -> None:
        os.close(self._descriptor)


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
