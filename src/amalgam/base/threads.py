"""Threads that may be inside an extension when the process wants to end.

Python ends a daemon thread where it next asks for the interpreter's lock, by unwinding its stack. Frames of C++ that
must not be unwound then end the process: "terminate called without an active exception", SIGABRT. So whatever computes
or reads in the background does so in a `StoppableThread`, and the interpreter stops these before it goes.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

EXIT_SECONDS = 5.0  # how long an end waits for what is being computed: a step, a weight
T = TypeVar("T")
R = TypeVar("R")

_running: dict[StoppableThread, None] = {}  # in the order of their starts


class StoppableThread(threading.Thread):
    """A daemon thread that is told to stop, and waited for, when the interpreter ends.

    Args:
        stop: makes `target` return soon; called from any thread, perhaps twice.
    """

    def __init__(self, target: Callable[[], None], name: str, stop: Callable[[], None]) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self.stop = stop

    def start(self) -> None:
        _running[self] = None
        try:
            super().start()
        except BaseException:
            _running.pop(self, None)
            raise

    def run(self) -> None:
        try:
            super().run()
        finally:
            _running.pop(self, None)


def stop_threads(seconds: float = EXIT_SECONDS) -> bool:
    """Stop the threads that run, the latest first, because it may need the earlier; False if some are still at it."""
    deadline = time.monotonic() + seconds
    threads = [thread for thread in reversed(list(_running)) if thread is not threading.current_thread()]
    for thread in threads:
        thread.stop()
        thread.join(max(deadline - time.monotonic(), 0))
    return not any(thread.is_alive() for thread in threads)


atexit.register(stop_threads)


def map_in_threads(work: Callable[[T], R], items: Iterable[T], num_threads: int, name: str) -> list[R]:
    """`[work(item) for item in items]`, several at a time.

    The first error ends it, an interrupt too: what has not begun is left out, what is under way is waited for.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix=name) as pool:
        try:
            futures = [pool.submit(work, item) for item in items]
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
