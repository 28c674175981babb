"""The configuration file that a server was started with, watched: its weight mapping comes into use when it changes.

In: a file, the settings read from it again. Out: changes of the weights, as anybody else asks for them. Must never
know: HTTP.

Only rules can change while a model runs. What else differs is told in the log, and comes with the next start.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amalgam.base.threads import StoppableThread
from amalgam.config.settings import Settings
from amalgam.errors import AmalgamError, ConflictError, UnavailableError
from amalgam.runtime.changes import ChangeRequest

logger = logging.getLogger("amalgam.models")

_RULES = ("model.mixed_precision.weight_mapping", "model.mixed_precision.rules")
_State = tuple[int, int, int]  # inode, size, time of change


class ConfigWatch:
    """Looks at a file every so many seconds.

    Args:
        read: the settings that the file gives now, as those of the start were read.
        settings: of the start.
        change: makes a change of the weights; blocking.
    """

    def __init__(
        self,
        path: Path,
        read: Callable[[], Settings],
        settings: Settings,
        change: Callable[[ChangeRequest], object],
    ) -> None:
        self._path = path
        self._read = read
        self._change = change
        self._started_with = settings
        self._rules = settings.model.mixed_precision.all_rules  # that the file had when it was last taken
        self._seen = self._state()
        self._taken: _State | None = None
        self._is_closing = threading.Event()

    def start(self, seconds: float) -> None:
        """Look every so many seconds, in a thread of its own, until the model is closed."""

        def run() -> None:
            while not self._is_closing.wait(seconds):
                try:
                    self.look()
                except UnavailableError:
                    return
                except Exception:
                    logger.exception("%s could not be looked at; weights stay as they are", self._path)

        StoppableThread(run, "amalgam-config", self._is_closing.set).start()

    def look(self) -> None:
        """Take the file's rules if it has changed, and has not changed any more since the look before.

        Raises:
            UnavailableError: the model has been closed.
        """
        state = self._state()
        is_settled, self._seen = state == self._seen, state
        if state == self._taken or not is_settled or state is None:
            return
        try:
            settings = self._read()
            self._warn_of_others(settings)
            rules = settings.model.mixed_precision.all_rules
            if rules != self._rules:
                logger.info("%s has changed: %d rules instead of %d", self._path, len(rules), len(self._rules))
                self._change(ChangeRequest(rules=rules))
        except ConflictError as error:
            logger.info("%s waits: %s", self._path, error)
            return  # the next look tries again
        except UnavailableError:
            raise
        except AmalgamError as error:
            logger.warning("%s has changed and cannot be taken; weights stay as they are. %s", self._path, error)
        else:
            self._rules = rules
        self._taken = state

    def _state(self) -> _State | None:
        """None: it is not there, as in the middle of being replaced."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _warn_of_others(self, settings: Settings) -> None:
        changed = sorted(differing(self._started_with.model_dump(), settings.model_dump()) - set(_RULES))
        if changed:
            logger.warning("%s: %s need a restart to be changed", self._path, ", ".join(changed))


def differing(before: Any, after: Any, name: str = "") -> set[str]:
    """The dotted names of the settings that differ."""
    if not (isinstance(before, dict) and isinstance(after, dict)) or name.count(".") > 1:
        return set() if before == after else {name}
    return {
        found
        for key in before.keys() | after.keys()
        for found in differing(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
    }
