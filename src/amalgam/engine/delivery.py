"""Outputs → their requests' callers, and to those who observe requests.

In: outputs of steps. Out: calls of what others have given, each of which may fail and harms nobody else. Must never
know: steps, the scheduler, tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar, TypeVarTuple

from amalgam.engine.in_flight import InFlight
from amalgam.engine.meter import Meter
from amalgam.engine.outputs import Deliveries
from amalgam.engine.probation import FailedVersion
from amalgam.engine.request import FinishReason, Request, RequestOutput
from amalgam.models.routing import RoutingObserver

T = TypeVar("T")
Told = TypeVarTuple("Told")

logger = logging.getLogger("amalgam.engine")


class Observers(Protocol):
    """Who hears of requests and versions beside the callers; see `Engine`. May be set at any time."""

    on_ended: Callable[[Request, RequestOutput], None] | None
    on_left: Callable[[int], None] | None
    on_version_failed: Callable[[FailedVersion], None] | None


class Delivery:
    """In the step thread, and in whichever stops an engine that has none.

    Args:
        routing: has the traces of requests; None: nobody sees their experts.
    """

    def __init__(
        self, in_flight: InFlight, meter: Meter, routing: RoutingObserver | None, observers: Observers
    ) -> None:
        self._in_flight = in_flight
        self._meter = meter
        self._routing = routing
        self._observers = observers

    def deliver(self, deliveries: Deliveries) -> None:
        """Call everyone who waits for these outputs. A request is in flight until it has its last one."""
        ended: list[int] = []
        try:
            for request, output in deliveries:
                if output.is_finished:
                    output = self._show(request, output)
                    ended.append(request.request_id)
                try:
                    request.on_output(output)
                except BaseException as error:  # one that ends a thread must not end this one: others wait for outputs
                    what = "Nobody takes the outputs of request %d: it ends."
                    logger.warning(what, request.request_id, exc_info=error)
                    self._in_flight.cancel(request.request_id, FinishReason.CANCELLED)
        finally:  # whatever has gone wrong, who has got a last output gets no second one
            if ended:
                self._in_flight.remove(ended)
        if ended:
            for version_id in {output.usage.version for _, output in deliveries if output.usage is not None}:
                _tell(self._observers.on_left, version_id)

    def abandon(self) -> None:
        """Answer everyone who is left. Runs after the last step, and after whatever may have gone wrong in it."""
        self.deliver(self._in_flight.abandon())

    def report_failed(self, version: FailedVersion) -> None:
        """A version has been left."""
        _tell(self._observers.on_version_failed, version)

    def _show(self, request: Request, output: RequestOutput) -> RequestOutput:
        """Count a last output and show it to those who observe requests; returns it with its trace."""
        self._meter.add_finished(output)
        if self._routing is not None and request.observation.wants_trace:
            output = output._replace(trace=_tell(self._routing.take_trace, request.request_id))
        _tell(self._observers.on_ended, request, output)
        return output


def _tell(observer: Callable[[*Told], T] | None, *told: *Told) -> T | None:
    """What an observer answers; None if there is none, or if it fails, which is its own matter: requests go on."""
    if observer is None:
        return None
    try:
        return observer(*told)
    except BaseException as error:  # one that ends a thread must not end this one
        logger.error("An observer of the engine has failed.", exc_info=error)
        return None
