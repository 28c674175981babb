"""Processes that this one has started, known by the file that they run."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def running(file: str) -> set[int]:
    """Ids of those that run a file."""
    found = set()
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended, or the child
            for pid in children.read_text().split():
                if os.fsencode(file) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                    found.add(int(pid))
    return found


def kill(pid: int) -> None:
    """End one, and leave it to whoever has started it to find that out."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
