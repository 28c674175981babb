"""Keeps the statistics in a file across restarts.

In: something that gives and takes saved sets. Out: the file, now and then and at the end. Must never know: steps.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Protocol

from amalgam.experts.saved import SavedSet, load, replace_file, to_bytes

logger = logging.getLogger("amalgam.experts")


class Keepable(Protocol):
    def saved_set(self, *, with_history: bool) -> SavedSet: ...

    def restore(self, saved: SavedSet, where: str) -> None: ...


class Keeper:
    """Restores at once, then saves every `seconds` in a thread of its own, and once more when closed.

    A file that cannot be written is logged: the traffic matters more than its statistics.

    Raises:
        CheckpointError, ConfigError: the file does not fit. It is left as it is.
    """

    def __init__(self, statistics: Keepable, path: Path, seconds: float) -> None:
        self._statistics = statistics
        self._path = path
        self._seconds = seconds
        if path.exists():
            statistics.restore(load(path), f"statistics.file {str(path)!r}")
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="amalgam-statistics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Save and end."""
        self._is_closing.set()
        self._thread.join()
        self._save()

    def _run(self) -> None:
        while not self._is_closing.wait(self._seconds):
            self._save()

    def _save(self) -> None:
        try:
            replace_file(self._path, to_bytes(self._statistics.saved_set(with_history=True)))
        except OSError as error:
            logger.error("The expert statistics cannot be saved in %r: %s", str(self._path), error)
