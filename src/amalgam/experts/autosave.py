"""Saves the statistics in a file that they go on from after a restart.

In: something that gives and takes saved sets. Out: the file, at intervals and at the end. Must never know: steps.
"""

from __future__ import annotations

import logging
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from amalgam.base.locks import FileLock
from amalgam.base.threads import StoppableThread
from amalgam.errors import AmalgamError, ConflictError
from amalgam.experts.saved.files import load, save
from amalgam.experts.saved.sets import SavedSet

logger = logging.getLogger("amalgam.experts")


class Saveable(Protocol):
    def saved_set(self, *, with_history: bool) -> SavedSet: ...

    def restore(self, saved: SavedSet, where: str) -> None: ...


class Autosave:
    """Restores at once, then saves every `seconds` in a thread of its own, and once more at the end.

    The file is locked meanwhile: of two processes that save in it, each would undo the other's counts. A save
    that fails is logged, and the next one tries again: the traffic matters more than its statistics.

    Raises:
        CheckpointError, ConfigError: the file does not fit. It is left as it is.
        ConflictError: another process saves its statistics in it.
    """

    def __init__(self, statistics: Saveable, path: Path, seconds: float) -> None:
        self._statistics = statistics
        self._path = path
        self._seconds = seconds
        self._lock = FileLock(path)
        with ExitStack() as cleanup:
            cleanup.enter_context(self._lock)
            self._take_lock()
            if path.exists():
                statistics.restore(load(path), f"statistics.file {str(path)!r}")
            self._is_closing = threading.Event()
            self._thread = StoppableThread(self._run, "amalgam-statistics", self._is_closing.set)
            self._thread.start()
            cleanup.pop_all()

    def close(self) -> None:
        """Save and end. Harmless when repeated."""
        self._is_closing.set()
        self._thread.join()

    def _take_lock(self) -> None:
        try:
            is_ours = self._lock.try_acquire()
        except OSError as error:  # saving will fail too, unless somebody mends the folder
            logger.error("statistics.file %r cannot be locked: %s", str(self._path), error)
            return
        if not is_ours:
            raise ConflictError(
                f"statistics.file {str(self._path)!r} is in use by {self._lock.holder}.",
                remedy="Give each process a file of its own, or this one none (an empty statistics.file); "
                "`amalgam experts --merge` adds files up.",
            )

    def _run(self) -> None:
        with self._lock:
            while not self._is_closing.wait(self._seconds):
                self._save()
            self._save()

    def _save(self) -> None:
        try:
            save(self._statistics.saved_set(with_history=True), self._path)
        except (OSError, AmalgamError) as error:
            logger.error("The expert statistics cannot be saved in %r: %s", str(self._path), error)
        except Exception:
            logger.exception("The expert statistics cannot be saved in %r", str(self._path))
