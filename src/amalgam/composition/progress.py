"""How long work says how far it is and that it waits, and how it waits for others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from amalgam.base.locks import FileLock

logger = logging.getLogger("amalgam.models")

LOADING = "Loading weights"  # told once for each weight that has been read

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all
Turn = Callable[[], AbstractContextManager[object]]  # what each loading thread enters around one weight


def waiting_for(path: Path, lock: FileLock, progress: Progress | None) -> Callable[[], None]:
    """What a wait for another process' lock calls: it says so once, and lets `progress` show it and end it."""
    is_said = False

    def wait() -> None:
        nonlocal is_said
        if not is_said:
            logger.warning("%s: waiting for %s, which is writing there", path, lock.holder)
            is_said = True
        if progress is not None:
            progress(f"Waiting for another process to write {path.name}", 0, 1)

    return wait
