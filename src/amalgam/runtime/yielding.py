"""Weights are built beside requests that run: the building threads stay behind them.

In: whether requests run. Out: turns for loading threads. Must never know: weights, requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from amalgam.kernels.quiet import be_quiet

_quiet = threading.local()


def begin_quietly() -> None:
    """Have the calling thread, a new one, compute alone and behind others; harmless when repeated."""
    if not getattr(_quiet, "is_so", False):
        be_quiet()
        _quiet.is_so = True


class Turns:
    """A `Turn`: while requests run, one thread builds at a time, and what it needs beside its result is in memory once.

    Threads that enter it then stay behind others, so it is for those that are there for nothing else. The thread that
    plans is not among them: while it waits for a core it may hold the interpreter's lock, which the engine needs.

    Args:
        is_serving: whether requests run now.
        check: raises what ends the work; who has waited asks it first.
    """

    def __init__(self, is_serving: Callable[[], bool], check: Callable[[], None]) -> None:
        self._is_serving = is_serving
        self._check = check
        self._place = threading.Lock()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if not self._is_serving():
            yield
            return
        begin_quietly()
        with self._place:
            self._check()
            yield
