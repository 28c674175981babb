"""What all processes of a cluster take, and what their filters have found, as if it had been one server.

In: what replicas tell of themselves. Out: figures by host, by replica, and of all. Must never know: metrics, HTTP.

Memory is added up host by host, for that is where it ends: a container has a host's name of its own. What a replica
that has gone has counted stays: Prometheus takes a counter that falls for one that began anew.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from amalgam.base.machine import ProcessFigures, this_process
from amalgam.cluster.interface import Figures
from amalgam.cluster.members import Members

if TYPE_CHECKING:
    from amalgam.server.filters import FilterCount

FIGURES_SECONDS = 0.5  # how old they may be
TELL_SECONDS = 5.0  # how long a replica may take to tell them


class ClusterFigures:
    """See above. Blocking; any thread but the event loop's.

    Args:
        own: what the gateway's filters have found.
    """

    def __init__(self, members: Members, own: Callable[[], Mapping[FilterCount, int]]) -> None:
        self._members = members
        self._own = own
        self._lock = threading.Lock()
        self._told: dict[str, Figures] = {}  # by each replica at last, those that have gone too
        self._told_at = 0.0

    def filtered(self) -> Mapping[FilterCount, int]:
        """What all filters have found."""
        found: Counter[FilterCount] = Counter(dict(self._own()))
        for told in self._read().values():
            found.update(told.filtered)
        return found

    def by_host(self) -> Mapping[str, ProcessFigures]:
        """What the processes of each host take together, the gateway's too."""
        running = set(self._members.ids())
        alive = defaultdict(list, {socket.gethostname(): [this_process()]})
        gone_seconds: defaultdict[str, float] = defaultdict(float)
        for replica_id, told in self._read().items():
            if replica_id in running:
                alive[told.host].append(told.process)
            else:
                gone_seconds[told.host] += told.process.cpu_seconds
        return {host: _together(processes, gone_seconds[host]) for host, processes in alive.items()}

    def by_replica(self) -> Mapping[str, ProcessFigures]:
        """Of those that run."""
        told = self._read()
        return {replica_id: told[replica_id].process for replica_id in self._members.ids() if replica_id in told}

    def _read(self) -> Mapping[str, Figures]:
        with self._lock:
            if time.monotonic() - self._told_at > FIGURES_SECONDS:
                self._told |= self._members.all(self._members.ids(), "figures", seconds=TELL_SECONDS).results
                self._told_at = time.monotonic()
            return dict(self._told)


def _together(processes: list[ProcessFigures], gone_seconds: float) -> ProcessFigures:
    """Of one host.

    Args:
        gone_seconds: processor time of those that have ended.
    """
    memory: Counter[str] = Counter()
    for process in processes:
        memory.update(process.memory)
    return ProcessFigures(
        dict(memory),
        min(process.memory_limit for process in processes),
        gone_seconds + sum(process.cpu_seconds for process in processes),
        max(process.threads for process in processes),
    )
