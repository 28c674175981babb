"""All replicas, to whoever blocks: one call of one of them, or of all at once.

In: names of calls, arguments. Out: what came of it, replica by replica. Must never know: what is called, what for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from amalgam.cluster.interface import Transport
from amalgam.errors import AmalgamError, ReplicaLostError, UnavailableError

logger = logging.getLogger("amalgam.cluster")


@dataclass(frozen=True)
class Outcomes:
    """What came of one call of several replicas."""

    results: Mapping[str, Any]
    errors: Mapping[str, AmalgamError]  # of replicas that live
    lost: frozenset[str]  # replicas that have gone meanwhile
    late: frozenset[str] = frozenset()  # replicas that have not answered in time


class Members:
    """See above. Any thread but the event loop's own.

    Args:
        loop: the transport's.
    """

    def __init__(self, transport: Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop

    def ids(self) -> list[str]:
        """The replicas that run, as far as is known, in an order that stays."""
        return sorted(self._transport.ids())

    def call(self, replica_id: str, method: str, *args: Any) -> Any:
        """
        Raises:
            AmalgamError: it was raised there.
            ReplicaLostError: the replica has gone.
            UnavailableError: the call has failed in another way.
        """
        return _result(replica_id, self._begin(replica_id, method, *args))

    def any(self, method: str, *args: Any, among: Collection[str] | None = None) -> Any:
        """What the first replica answers that has not gone.

        Raises:
            AmalgamError: it was raised there.
            UnavailableError: there is none, or the call has failed in another way.
        """
        for replica_id in sorted(self.ids() if among is None else among):
            try:
                return self.call(replica_id, method, *args)
            except ReplicaLostError:
                continue
        raise UnavailableError("No replica is ready.", remedy="GET /ready tells when requests are taken.")

    def all(
        self,
        among: Collection[str],
        method: str,
        *args: Any,
        seconds: float | None = None,
        while_waiting: Callable[[int], None] | None = None,
    ) -> Outcomes:
        """The same call of several replicas at a time.

        Args:
            seconds: to wait for them in all. What is late goes on, and nobody hears of its end. None: as they take.
            while_waiting: called with the number of replicas that have answered, again and again. It may raise once
                and for all: then what is under way goes on, and is waited for.
        """
        calls = {replica_id: self._begin(replica_id, method, *args) for replica_id in among}
        deadline = None if seconds is None else time.monotonic() + seconds
        interruption: Exception | None = None
        while True:
            is_asked = while_waiting is not None and interruption is None
            _, unanswered = wait(calls.values(), _patience(deadline, _POLL_SECONDS if is_asked else None))
            if not unanswered or (deadline is not None and time.monotonic() >= deadline):
                break
            if while_waiting is not None and interruption is None:
                try:
                    while_waiting(len(calls) - len(unanswered))
                except Exception as error:
                    interruption = error
        if interruption is not None:
            raise Interrupted() from interruption
        results, errors, lost, late = {}, {}, set(), set()
        for replica_id, call in calls.items():
            if call in unanswered:
                late.add(replica_id)
                continue
            try:
                results[replica_id] = _result(replica_id, call)
            except ReplicaLostError:
                lost.add(replica_id)
            except AmalgamError as error:
                errors[replica_id] = error
        return Outcomes(results, errors, frozenset(lost), frozenset(late))

    def _begin(self, replica_id: str, method: str, *args: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(self._transport.call(replica_id, method, *args), self._loop)


class Interrupted(Exception):  # noqa: N818 – nothing has gone wrong
    """Somebody wants a call of several replicas no more; its cause says why."""


def _result(replica_id: str, call: Future[Any]) -> Any:
    """What a call has returned. Who calls several replicas goes on with the others whatever one of them raises.

    Raises:
        AmalgamError: it was raised there.
        ReplicaLostError: the replica has gone.
        UnavailableError: the call has failed in another way.
    """
    try:
        return call.result()
    except AmalgamError:
        raise
    except Exception as error:
        logger.exception("a call of replica %s has failed", replica_id)
        raise UnavailableError(
            f"A call of replica {replica_id} has failed: {type(error).__name__}.", remedy="The log has the cause."
        ) from error


def _patience(deadline: float | None, poll_seconds: float | None) -> float | None:
    """How long to wait for replicas before looking at anything else; None: until all have answered."""
    left = None if deadline is None else max(0.0, deadline - time.monotonic())
    return min((limit for limit in (left, poll_seconds) if limit is not None), default=None)


_POLL_SECONDS = 0.1
