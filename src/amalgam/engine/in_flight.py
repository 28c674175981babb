"""The requests in flight, and whatever else callers and the step loop share.

In: requests and what their callers want of them, from any thread. Out: what the step loop has to do. Must never know:
how a step is computed, who takes outputs.

One condition guards all of it. The loop never holds it while a step computes or a callback runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from amalgam.engine.meter import Load, Meter
from amalgam.engine.outputs import Deliveries, end
from amalgam.engine.probation import Probation
from amalgam.engine.request import EngineStatus, FinishReason, Request, RequestStatus
from amalgam.engine.rollback import Rollback
from amalgam.engine.scheduler import Scheduler
from amalgam.engine.speculation.speculator import Speculator
from amalgam.errors import UnavailableError, describe

logger = logging.getLogger("amalgam.engine")


class InFlight:
    """
    Args:
        observe: is shown each request before it enters the queue, with its id; what it raises keeps it out.
        speculator: see `Engine`; it forgets those that end.

    Attributes:
        condition: to be held by whoever uses the scheduler or the rollback. It is notified when requests come or go.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        probation: Probation,
        meter: Meter,
        observe: Callable[[Request], None],
        speculator: Speculator | None,
    ) -> None:
        self.speculator = speculator
        self._meter = meter
        self._observe = observe
        self.condition = threading.Condition()  # guards everything below
        self.scheduler = scheduler
        self.rollback = Rollback(
            probation,
            scheduler,
            end=lambda requests, error: self.finish(requests, FinishReason.ERROR, error),
            forget_guesses=self._forget_guesses,
        )
        self._requests: dict[int, Request] = {}  # until their last output has been delivered
        self._cancelled: list[Request] = []
        self._next_id = 1
        self._is_draining = False
        self._end: tuple[str, str] | None = None  # why nothing is computed any more, and what helps
        self._has_abandoned = False  # then those who were left have been answered

    def add(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            OverloadedError: the queue is full.
            UnavailableError: the engine is draining, has stopped or has failed.
            Whatever `observe` raises.
        """
        with self.condition:
            if self._end is not None:
                raise _unavailable(self._end)
            if self._is_draining:
                raise UnavailableError("The engine is draining.", remedy="Send the request to another server.")
            version = request.version
            if version is not None and not request.keeps_version and self.rollback.has_failed(version):
                request.version = None  # it was chosen before that
            request.request_id = self._next_id
            self.scheduler.check_room()
            self._observe(request)
            self.scheduler.add(request)
            self.note_load()
            self._next_id += 1
            self._requests[request.request_id] = request
            self.condition.notify_all()
            return request.request_id

    def cancel(self, request_id: int, reason: FinishReason) -> None:
        """See `Engine.cancel`."""
        with self.condition:
            request = self._requests.get(request_id)
            if request is None or request.is_cancelled or request.status is RequestStatus.FINISHED:
                return
            request.is_cancelled, request.cancelled_as = True, reason
            self._cancelled.append(request)

    def drain(self, timeout_seconds: float) -> bool:
        """See `Engine.drain`."""
        with self.condition:
            self._is_draining = True
            return self.condition.wait_for(lambda: not self._requests, timeout_seconds)

    def stop(self) -> None:
        """Nothing is computed any more from the next step on."""
        with self.condition:
            remedy = "Send the request to another server, or again once this one has been restarted."
            self._end = self._end or ("The engine has been stopped.", remedy)
            self.condition.notify_all()

    def fail(self, error: BaseException) -> None:
        """Nothing is computed any more from the next step on, and `error` is why."""
        logger.critical("The engine has failed and ends.", exc_info=error)
        with self.condition:
            reason = f"{type(error).__name__}: {describe(str(error), 400)}"
            self._end = (f"The engine has failed with {reason}.", "Restart it; the log has the cause.")

    def wait_for_work(self) -> bool:
        """Wait for a request; False if nothing is computed any more."""
        with self.condition:
            self.condition.wait_for(lambda: self._end is not None or self.scheduler.has_requests)
            return self._end is None

    def remove(self, request_ids: Iterable[int]) -> None:
        """The last outputs of these have been delivered."""
        with self.condition:
            for request_id in request_ids:
                del self._requests[request_id]
            self.condition.notify_all()

    def abandon(self) -> Deliveries:
        """The last outputs of everyone who is left at the engine's end; the second time there are none."""
        with self.condition:
            if self._has_abandoned:
                return []
            self._has_abandoned = True
            assert self._end is not None
            now, error = time.monotonic(), _unavailable(self._end)
            deliveries = [(r, end(r, FinishReason.ERROR, now, error=error)) for r in self._requests.values()]
            self.scheduler.clear()
            self.note_load()
            self._cancelled.clear()
            return deliveries

    def status(self, *, is_running: bool) -> EngineStatus:
        """A consistent view of the moment.

        Args:
            is_running: whether there is a step loop.
        """
        with self.condition:
            return EngineStatus(
                is_alive=self._end is None and is_running,
                is_draining=self._is_draining,
                num_running=len(self.scheduler.running),
                num_waiting=len(self.scheduler.waiting),
                num_free_blocks=self.scheduler.pool.num_free,
                num_blocks=self.scheduler.pool.num_blocks,
                versions=self.scheduler.count_by_version(),
            )

    # What follows is the step loop's, which holds the condition.

    def finish_cancelled(self) -> Deliveries:
        """End those that were cancelled; returns their last outputs."""
        if not self._cancelled:
            return []
        requests = [request for request in self._cancelled if request.status is not RequestStatus.FINISHED]
        self._cancelled.clear()
        return [ended for request in requests for ended in self.finish([request], request.cancelled_as)]

    def finish(self, requests: Sequence[Request], reason: FinishReason, error: Exception | None = None) -> Deliveries:
        """End requests; returns their last outputs."""
        now = time.monotonic()
        deliveries = [(request, end(request, reason, now, error=error)) for request in requests]
        for request in requests:
            self.leave(request, is_sound=error is None)
        self.note_load()
        return deliveries

    def leave(self, request: Request, *, is_sound: bool) -> None:
        """A request has ended: its blocks are free. See `Scheduler.finish`."""
        self.scheduler.finish(request, is_sound=is_sound)
        self._forget_guesses(request.request_id)

    def note_load(self) -> None:
        """Tell the meter how much is under way now."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        load = Load(len(scheduler.running), len(scheduler.waiting), pool.num_blocks - pool.num_free)
        self._meter.set_load(load, scheduler.counts)

    def _forget_guesses(self, request_id: int) -> None:
        if self.speculator is not None:
            self.speculator.forget(request_id)


def _unavailable(why: tuple[str, str]) -> UnavailableError:
    what, remedy = why
    return UnavailableError(what, remedy=remedy)
