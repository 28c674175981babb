"""Reading the headers of a large model makes a million small objects, all of which stay.

Python's cycle collector walks over them again and again without finding anything: a third of the time. Must never know
what is read.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for cycles meanwhile; also a decorator. What nothing refers to is freed all the same.

    It holds for all threads. Where two overlap, the first to end may end the pause of both, never the other way round.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
