"""All replicas, to whoever blocks: one call of one of them, or of all at once.

In: names of calls, arguments. Out: what came of it, replica by replica. Must never know: what is called, what for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from amalgam.cluster.interface import Transport
from amalgam.errors import AmalgamError, ReplicaLostError, UnavailableError


@dataclass(frozen=True)
class Outcomes:
    """What came of one call of several replicas."""

    results: Mapping[str, Any]
    errors: Mapping[str, AmalgamError]  # of replicas that live
    lost: frozenset[str]  # replicas that have gone meanwhile


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
        """
        return asyncio.run_coroutine_threadsafe(self._transport.call(replica_id, method, *args), self._loop).result()

    def any(self, method: str, *args: Any, among: Collection[str] | None = None) -> Any:
        """What the first replica answers that has not gone.

        Raises:
            AmalgamError: it was raised there.
            UnavailableError: there is none.
        """
        for replica_id in sorted(self.ids() if among is None else among):
            try:
                return self.call(replica_id, method, *args)
            except ReplicaLostError:
                continue
        raise UnavailableError("No replica is ready.", remedy="GET /ready tells when requests are taken.")

    def all(
        self, among: Collection[str], method: str, *args: Any, while_waiting: Callable[[int], None] | None = None
    ) -> Outcomes:
        """The same call of several replicas at a time.

        Args:
            while_waiting: called with the number of replicas that have answered, again and again. It may raise once
                and for all: then what is under way goes on, and is waited for.
        """
        tasks = {
            replica_id: asyncio.run_coroutine_threadsafe(self._transport.call(replica_id, method, *args), self._loop)
            for replica_id in among
        }
        results, errors, lost = {}, {}, set()
        interruption: BaseException | None = None
        for replica_id, task in tasks.items():
            while True:
                try:
                    results[replica_id] = task.result(None if while_waiting is None or interruption else _POLL_SECONDS)
                except ReplicaLostError:
                    lost.add(replica_id)
                except AmalgamError as error:
                    errors[replica_id] = error
                except TimeoutError:
                    if while_waiting is not None:
                        try:
                            while_waiting(sum(other.done() for other in tasks.values()))
                        except AmalgamError as error:
                            interruption = error
                    continue
                break
        if interruption is not None:
            raise Interrupted(Outcomes(results, errors, frozenset(lost))) from interruption
        return Outcomes(results, errors, frozenset(lost))


class Interrupted(Exception):  # noqa: N818 – nothing has gone wrong
    """Somebody wants a call of several replicas no more; its cause says why."""

    def __init__(self, outcomes: Outcomes) -> None:
        super().__init__()
        self.outcomes = outcomes


_POLL_SECONDS = 0.1
