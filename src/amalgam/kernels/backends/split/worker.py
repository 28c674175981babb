"""A thread that computes beside the one that runs steps.

In: functions. Out: their ends. Must never know: what they compute.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from weakref import finalize

import torch

from amalgam.base.threads import StoppableThread
from amalgam.kernels.quiet import compute_alone

_Job = tuple[Callable[[], None], bool, "Future[None]"]


class Worker:
    """Runs one function after the other, in one compute thread. Its thread begins with the first and ends with it.

    One compute thread, because the kernels' pool serves one call at a time: whoever runs steps has the others.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: StoppableThread | None = None

    def submit(self, function: Callable[[], None]) -> Future[None]:
        """Its end, and its error. Of one thread at a time."""
        if self._thread is None:
            jobs = self._jobs
            self._thread = StoppableThread(lambda: _work(jobs), self._name, lambda: jobs.put(None))
            self._thread.start()
            finalize(self, jobs.put, None)
        future: Future[None] = Future()
        self._jobs.put((function, torch.is_inference_mode_enabled(), future))
        return future


def _work(jobs: queue.SimpleQueue[_Job | None]) -> None:
    compute_alone()
    while (job := jobs.get()) is not None:
        function, is_inference, future = job
        try:
            with torch.inference_mode(is_inference), torch.no_grad():
                function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        del job, function, future  # what they hold may go before the next one comes
