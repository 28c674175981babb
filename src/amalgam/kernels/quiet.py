"""Threads that compute beside the engine and leave it the processors.

In: the calling thread. Out: how many threads its operators use, and its priority. Must never know what is computed.

An operator that is spread over threads waits for the slowest of them. Beside an engine that keeps every core busy, each
such wait is a turn of the scheduler: some milliseconds, however little there is to compute.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

NICENESS = 5  # more than others; no more than that: whoever holds the interpreter's lock must not wait long for a core

_turning = threading.Lock()


@contextmanager
def alone() -> Iterator[None]:
    """Within it the calling thread computes without help from others."""
    num_threads = torch.get_num_threads()
    if num_threads == 1:
        yield
        return
    _take_threads(1, for_others=num_threads)
    try:
        yield
    finally:
        _take_threads(num_threads, for_others=num_threads)


def compute_alone() -> None:
    """Have the calling thread, from now on, compute without help from others. Once for each thread."""
    _take_threads(1, for_others=torch.get_num_threads())


def be_quiet() -> None:
    """Have the calling thread, from now on, compute alone and behind others. Once for each thread."""
    compute_alone()
    with suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def _take_threads(count: int, for_others: int) -> None:
    """Set how many threads the operators of the calling thread use.

    Args:
        for_others: how many those of threads that are begun from now on use.
    """
    with _turning:  # a thread that is begun in between takes what was set last
        torch.set_num_threads(count)
        if count != for_others:
            # It would hold for later threads too. A thread that says otherwise undoes it for these only.
            other = threading.Thread(target=torch.set_num_threads, args=[for_others], name="amalgam-threads")
            other.start()
            other.join()
