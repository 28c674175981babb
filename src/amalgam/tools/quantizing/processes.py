"""Processes of other programs, each the leader of a group of its own, with whatever it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from typing import Any


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process, if it still runs, and what is left of what it has started.

    Args:
        process: begun with `start_new_session`.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
