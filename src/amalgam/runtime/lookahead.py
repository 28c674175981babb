"""Sources that are declared and not used yet, looked at before somebody asks for them.

In: a deployment. Out: nothing but what its loader keeps: opened sources, and how they compare with the one that most
weights come from. Must never know: requests, HTTP.

To open a source and to compare it takes most of the time of the first change that uses it: on a model of 1,500 expert
weights about a second, while a later one takes a quarter of that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from amalgam.base.threads import StoppableThread
from amalgam.composition.loader import ModelLoader
from amalgam.errors import AmalgamError, PlanError
from amalgam.runtime.deployment import Deployment

logger = logging.getLogger("amalgam.models")


def look_ahead(deployment: Deployment) -> None:
    """Look at the sources that no weight comes from yet, in the background, where `weights.look_ahead` says so."""
    if deployment.settings.weights.look_ahead:
        used = {origin.source for origin in deployment.version.origins.values()}
        LookAhead(deployment.loader, [name for name in deployment.loader.sources if name not in used]).start()


class LookAhead:
    """Looks at sources in a thread of its own, those that lie on this machine: others would be downloaded.

    What is wrong with one is logged, and told again to whoever asks for it.

    Args:
        sources: names that the loader knows.
    """

    def __init__(self, loader: ModelLoader, sources: Iterable[str]) -> None:
        self._loader = loader
        self._sources = [name for name in sources if Path(loader.sources[name]).expanduser().exists()]
        self._is_closing = threading.Event()
        self._thread = StoppableThread(self._run, "amalgam-look-ahead", self._is_closing.set)

    def start(self) -> None:
        self._thread.start()

    def wait(self) -> None:
        """Until all have been looked at."""
        self._thread.join()

    def _run(self) -> None:
        for name in self._sources:
            if self._is_closing.is_set():
                return
            began = time.monotonic()
            try:
                self._loader.look_at(name)
            except PlanError as error:  # all of it may still be taken together
                logger.info("Source %r: %s", name, error)
            except AmalgamError as error:
                logger.warning("Source %r cannot be used as it is: %s", name, error)
            else:
                logger.debug("Source %r: opened and compared in %.2f s", name, time.monotonic() - began)
