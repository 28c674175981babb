"""A thread that computes beside the one that runs steps.

In: functions. Out: their ends. Must never know: what they compute.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from weakref import finalize

import torch

from amalgam.base.threads import StoppableThread
from amalgam.kernels.quiet import compute_alone

_Job = tuple[Callable[[], None], bool, "Future[None]"]


class Worker:
    """Runs one function after the other, in one compute thread. Its thread begins with the first and ends with it.

    One compute thread, because the kernels' pool serves one call at a time: whoever runs steps has the others. When the
    process ends, this thread is stopped before the one that runs steps, which then computes by itself.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs = _Jobs()
        self._thread: StoppableThread | None = None

    def submit(self, function: Callable[[], None]) -> Future[None]:
        """Its end, and its error. Of one thread at a time."""
        if self._thread is None:
            jobs = self._jobs
            self._thread = StoppableThread(lambda: _work(jobs), self._name, jobs.close)
            self._thread.start()
            finalize(self, jobs.close)
        future: Future[None] = Future()
        job = function, torch.is_inference_mode_enabled(), future
        if not self._jobs.put(job):
            _run(*job)
        return future


class _Jobs:
    """What a thread is given. Behind the end nothing is taken, so that nobody waits for what is never done."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # the collector may close while the same thread does
        self._is_closed = False

    def put(self, job: _Job) -> bool:
        """False: it was not taken."""
        with self._lock:
            if not self._is_closed:
                self._queue.put(job)
            return not self._is_closed

    def get(self) -> _Job | None:
        """None: the end."""
        return self._queue.get()

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._queue.put(None)


def _work(jobs: _Jobs) -> None:
    compute_alone()
    while (job := jobs.get()) is not None:
        _run(*job)
        del job  # what it holds may go before the next one comes


def _run(function: Callable[[], None], is_inference: bool, future: Future[None]) -> None:
    try:
        with torch.inference_mode(is_inference), torch.no_grad():
            function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)
