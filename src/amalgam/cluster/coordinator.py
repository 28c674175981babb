"""One change of the weights of all replicas: all of them, or none.

In: what is asked for. Out: the same version, under one number, in all replicas. Must never know: HTTP, what carries
calls.

How replicas change together says `exchange`. Whatever comes in the place of one that has gone, or was set aside, gets
no requests until it has the version that the others have. If a version turns out to compute NaN in one replica, which
goes back by itself (`engine.probation`), all others go back, too: all keep the version before until none has doubts
about the current one any more.

What has changed is in `weights.history`, if that names a file: whoever coordinates next goes on from there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from amalgam.cluster.exchange import HOLD_SECONDS, Exchange, is_same
from amalgam.cluster.interface import Description, ReplicaState, Weights
from amalgam.cluster.members import Members
from amalgam.cluster.routing import Routing
from amalgam.config.names import CURRENT
from amalgam.config.placement import Rule
from amalgam.errors import AmalgamError, UnavailableError, VersionNotFoundError
from amalgam.runtime.changes import (
    MAX_UNDOS,
    ChangeRequest,
    RemapLog,
    RemapRecord,
    RemapResult,
    check_rollback,
    check_undo,
)
from amalgam.runtime.history import HistoryFile
from amalgam.runtime.jobs import Job, Jobs, status_of_record
from amalgam.runtime.versions import as_id, check_name

RETRY_SECONDS = 5.0
STATE_SECONDS = 5.0  # how long a replica may take to tell its state
_FIRST_ID = 1  # of the version that a replica begins with

logger = logging.getLogger("amalgam.cluster")


@dataclass(frozen=True)
class _Goal:
    """What all replicas are to have."""

    current: Weights
    named: Mapping[str, Weights]


class Coordinator:
    """See above. Any thread but the event loop's; what it is asked for is described at `Deployment`.

    Args:
        routing: is told which replicas may have requests.
        holding: keeps new requests waiting as long as its context lasts.
        history: of former coordinators, to go on from; closed by `close`.
        resumes: whether replicas that have just begun get the rules that held last.
        retry_seconds: until a replica that could not be brought to the others' weights is tried again.
        hold_seconds: what a replica has to go live before the others go on without it.
    """

    def __init__(
        self,
        members: Members,
        routing: Routing,
        holding: Callable[[], AbstractContextManager[None]],
        history: HistoryFile | None = None,
        *,
        resumes: bool = False,
        retry_seconds: float = RETRY_SECONDS,
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        self._members = members
        self._routing = routing
        self._exchange = Exchange(members, routing, holding, hold_seconds)
        self._history = history
        self._resumes = resumes
        self._retry_seconds = retry_seconds
        self._lock = threading.RLock()  # one change, or one look after the replicas, at a time
        self._goal: _Goal | None = None
        self._next_id = _FIRST_ID + 1
        self._before: Weights | None = None  # that all keep to go back to, until the current one has shown its worth
        self._earlier: list[int] = []  # versions that new requests started on, the latest last
        self._retry_at: dict[str, float] = {}
        self.num_failed_versions = 0
        records = () if history is None else history.records
        self.jobs = Jobs(lambda: self.version_id, map(status_of_record, records))
        self.log = RemapLog() if history is None else RemapLog(records, history.add)

    @property
    def current(self) -> Weights:
        """
        Raises:
            UnavailableError: no replica is ready yet.
        """
        if self._goal is None:
            raise UnavailableError("No replica is ready.", remedy="GET /ready tells when requests are taken.")
        return self._goal.current

    @property
    def version_id(self) -> int:
        return self.current.version_id

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.current.rules

    @property
    def num_undoable(self) -> int:
        return len(self._earlier)

    def begin(self) -> bool:
        """Agree on the weights to begin with: those that most replicas have, of several the older; False: none runs.

        Whoever coordinated before may have died between two replicas. Both versions are in all of them then, so that
        one of them is everywhere in a moment.
        """
        found: dict[str, Description] = dict(self._members.all(self._members.ids(), "describe").results)
        if not found:
            return False
        chosen = _most_common(found.values())
        self._goal = _Goal(chosen.current, dict(chosen.named))
        alike = (one.before for one in found.values() if is_same(one.current, chosen.current))
        self._before = next((before for before in alike if before is not None), None)
        if self._history is not None:
            self._go_on(self._history, found.keys())
        self._earlier = self.log.earlier_versions(self.rules)[-MAX_UNDOS:]
        self.log.start(RemapRecord(0.0, self.version_id, self.version_id, 0, 0, 0.0, rules=self.rules))
        return True

    def _go_on(self, history: HistoryFile, ids: Collection[str]) -> None:
        """Give replicas that have just begun a number that no version has had, and the rules that they are to have."""
        self._next_id = max(self._next_id, history.last_version_id + 1)
        current = self.current
        states: Mapping[str, ReplicaState] = self._members.all(ids, "state").results
        have_begun = all(state.version_id == _FIRST_ID == state.coming_id - 1 for state in states.values())
        never_changed = history.last_version_id == _FIRST_ID and self.log.rules_of(_FIRST_ID) == current.rules
        if not have_begun or not history.records or never_changed:
            return
        last_rules = history.last_rules if self._resumes else None
        for rules in dict.fromkeys((current.rules if last_rules is None else last_rules, current.rules)):
            try:
                with self.jobs.begin("start", "the rules to begin with") as job:
                    job.result, weights = self._put_into_use(job, ids, ChangeRequest(rules=rules))
            except AmalgamError as error:
                logger.warning("replicas cannot begin with the rules of the last version: %s", error)
                continue
            self._note_live(weights, current, None)
            return

    def note_answered(self, version_ids: Collection[int]) -> None:
        """These versions have given answers: a history says so, for whoever begins with them."""
        if self._history is not None:
            for version_id in version_ids:
                self._history.note_sound(version_id)

    def close(self) -> None:
        """A change under way gives up, and others may have the history."""
        self.jobs.close()
        if self._history is not None:
            if self._goal is not None:
                self._history.note_sound(self.version_id)
            self._history.close()

    # Looking after the replicas.

    def look_after(self) -> None:
        """Bring replicas to the weights that all are to have, and let them have requests when they are there.

        Does nothing while a change is under way. Blocking, as long as a replica takes to build what it lacks.
        """
        if self._goal is None or not self._lock.acquire(blocking=False):
            return
        try:
            if self.jobs.running is not None:
                return
            ids = self._members.ids()
            states: Mapping[str, ReplicaState] = self._members.all(ids, "state", seconds=STATE_SECONDS).results
            self._next_id = max([self._next_id, *(state.coming_id for state in states.values())])
            # Nobody but itself changes the version of a replica that is ready.
            left = [one for one in self._ready_ids() if one in states and states[one].version_id != self.version_id]
            if left:
                self._follow_back(left)
                return
            for replica_id, state in states.items():
                self._look_at(replica_id, state)
            if len(states) == len(ids):
                self._release(states)
        finally:
            self._lock.release()

    def _look_at(self, replica_id: str, state: ReplicaState) -> None:
        seen = self._routing.replicas.get(replica_id)
        if seen is None or seen.is_lost:
            return
        if not self._is_there(state):
            self._routing.set_ready(replica_id, is_ready=False)
        if not seen.is_ready and time.monotonic() >= self._retry_at.get(replica_id, 0.0):
            self._bring(replica_id)

    def _is_there(self, state: ReplicaState) -> bool:
        assert self._goal is not None
        wanted = {name: weights.version_id for name, weights in self._goal.named.items()}
        return state.version_id == self.version_id and dict(state.names) == wanted

    def _release(self, states: Mapping[str, ReplicaState]) -> None:
        """The version before is kept no longer once no replica can leave the current one by itself any more."""
        if any(state.is_on_probation for state in states.values()):
            return
        self._before = None
        keeping = [replica_id for replica_id, state in states.items() if state.before_id is not None]
        self._members.all(keeping, "release", seconds=STATE_SECONDS)

    def _bring(self, replica_id: str) -> None:
        """Give a replica the weights that all have."""
        assert self._goal is not None
        goal = self._goal
        try:
            self._exchange.bring(replica_id, goal.current, goal.named)
        except AmalgamError as error:
            self._retry_at[replica_id] = time.monotonic() + self._retry_seconds
            logger.warning("replica %s cannot have weight version %d: %s", replica_id, goal.current.version_id, error)
            return
        self._retry_at.pop(replica_id, None)
        self._routing.set_ready(replica_id, is_ready=True)
        logger.info("replica %s is ready with weight version %d", replica_id, goal.current.version_id)

    def _follow_back(self, left: Collection[str]) -> None:
        """Replicas have gone back by themselves: all others do the same, or these alone are at fault."""
        failed, before = self.current, self._before
        reason = f"version {failed.version_id} could not answer in replica {', '.join(left)}"
        if before is None:
            if len(left) < len(self._ready_ids()):  # in the others it has answered, and nothing is kept any more
                logger.warning("%s; it has in all others", reason)
                self.num_failed_versions += 1
                self._exchange.set_aside(left)
                self._retry_at |= dict.fromkeys(left, time.monotonic() + self._retry_seconds)
                return
            found: Mapping[str, Description] = self._members.all(left, "describe", seconds=STATE_SECONDS).results
            if not found:  # they have gone, too
                return
            before = _most_common(found.values()).current
        self.num_failed_versions += 1
        logger.warning("%s: all replicas go back to version %d", reason, before.version_id)
        self._exchange.go_back(self._ready_ids(), before)
        assert self._goal is not None
        self._goal, self._before = replace(self._goal, current=before), None
        if before.version_id in self._earlier:
            del self._earlier[self._earlier.index(before.version_id) :]
        record = self.log.add_failed_version(before.version_id, before.rules, failed.version_id, reason)
        self.jobs.add(status_of_record(record))

    # Changes.

    def change(self, request: ChangeRequest) -> RemapResult:
        """See `Deployment.change`.

        Raises:
            UnavailableError: no replica is ready, or one has gone on the way.
        """
        with self._change(request.kind, request.what) as job:
            return self._make(job, request)

    def rollback(self, version: str | int | None = None) -> RemapResult:
        """See `Deployment.rollback`."""
        with self._change("rollback", f"back to {'the version before' if version is None else version}") as job:
            if version is not None:
                return self._make(job, ChangeRequest(version=version))
            check_rollback(self._earlier)
            earlier = list(self._earlier)
            result = self._make(job, ChangeRequest(version=earlier[-1]))
            self._earlier = earlier[:-1]
            return result

    def undo(self, version_id: int) -> RemapResult:
        """See `Deployment.undo_weight_mapping`."""
        with self._change("undo", f"back from version {version_id}") as job:
            check_undo(version_id, self.version_id, self._earlier)
            earlier = list(self._earlier)
            result = self._make(job, ChangeRequest(rules=self._rules_of(earlier[-1], self._ready_ids())))
            self._earlier = earlier[:-1]
            return result

    def start(self, request: ChangeRequest) -> Job:
        """See `Deployment.start_change`."""
        if request.name is not None:
            check_name(request.name)
        return self.jobs.start(request.kind, request.what, lambda: self.change(request))

    def start_rollback(self) -> Job:
        """See `Deployment.start_rollback`."""
        return self.jobs.start("rollback", "back to the version before", self.rollback)

    def remove_name(self, name: str) -> int:
        """Take a name away everywhere; the id of its version.

        Raises:
            VersionNotFoundError: there is no such name.
        """
        with self._lock:
            if self._goal is None or name not in self._goal.named:
                raise VersionNotFoundError(f"There are no weights {name!r}.", remedy="GET /weights lists those.")
            named = dict(self._goal.named)
            weights = named.pop(name)
            self._goal = replace(self._goal, named=named)
            self._members.all(self._ready_ids(), "remove_name", name)
            return weights.version_id

    @contextmanager
    def _change(self, kind: str, what: str) -> Iterator[Job]:
        with self.jobs.begin(kind, what) as job, self._lock:
            try:
                yield job
            except Exception as error:
                self.log.add_failure(self.version_id, job.status().seconds, error, job.asked)
                raise

    def _make(self, job: Job, request: ChangeRequest) -> RemapResult:
        started, before = time.monotonic(), self.current
        ids = self._ready_ids()
        if not ids:
            raise UnavailableError("No replica is ready.", remedy="GET /ready tells when requests are taken.")
        result, weights = self._put_into_use(job, ids, request)
        self._note_live(weights, before, request.name)
        seconds = time.monotonic() - started
        result = replace(result, previous_version=before.version_id, seconds=seconds, name=request.name)
        self.log.add(result, weights.rules, job.asked)
        job.result = result
        return result

    def _put_into_use(self, job: Job, ids: Collection[str], request: ChangeRequest) -> tuple[RemapResult, Weights]:
        """What is asked for in all of these replicas, or in none."""
        resolved, rules = self._resolved(request, ids)
        result, digest = self._exchange.make(job, ids, resolved, self.current, request.name)
        self._next_id = max(self._next_id, result.version + 1)
        return result, Weights(result.version, rules, digest)

    def _resolved(self, request: ChangeRequest, ids: Collection[str]) -> tuple[ChangeRequest, tuple[Rule, ...]]:
        """The same without what only some replicas know, and with a number that is free in all; the rules of it.

        Raises:
            VersionNotFoundError: nobody knows the version that is to come back.
            PlanError: see `ChangeRequest.rules_after`.
        """
        states: Mapping[str, ReplicaState] = self._members.all(ids, "state").results
        coming = max([self._next_id, *(state.coming_id for state in states.values())])
        if request.version is None:
            return replace(request, name=None, version_id=coming), request.rules_after(self.rules)
        version_id = self._id_of(request.version)
        rules = self._rules_of(version_id, ids)
        if all(version_id in state.kept_ids for state in states.values()):
            return ChangeRequest(version=version_id), rules
        return ChangeRequest(rules=rules, version_id=coming), rules

    def _rules_of(self, version_id: int, ids: Collection[str]) -> tuple[Rule, ...]:
        """
        Raises:
            VersionNotFoundError: nobody knows them.
        """
        rules: tuple[Rule, ...] | None = self.log.rules_of(version_id)
        if rules is None:  # there was another coordinator, and no history
            rules = self._members.any("rules_of", version_id, among=ids)
        if rules is None:
            raise VersionNotFoundError(
                f"There is no weight version {version_id}.", remedy="GET /weights/changes tells of earlier ones."
            )
        return rules

    def _id_of(self, version: str | int) -> int:
        assert self._goal is not None
        if version == CURRENT:
            return self.version_id
        if isinstance(version, str) and version in self._goal.named:
            return self._goal.named[version].version_id
        version_id = as_id(version)
        if version_id is None:
            known = ", ".join([CURRENT, *self._goal.named])
            raise VersionNotFoundError(f"There are no weights {version!r}.", remedy=f"Known: {known}.")
        return version_id

    def _note_live(self, weights: Weights, before: Weights, name: str | None) -> None:
        assert self._goal is not None
        if name is not None:
            self._goal = replace(self._goal, named={**self._goal.named, name: weights})
            return
        self._goal = replace(self._goal, current=weights)
        if weights.version_id == before.version_id:
            return
        self._earlier = [*self._earlier, before.version_id][-MAX_UNDOS:]
        if self._before is None:
            self._before = before
        elif self._before.version_id == weights.version_id:
            self._before = None

    def _ready_ids(self) -> list[str]:
        return sorted(
            replica_id
            for replica_id, seen in list(self._routing.replicas.items())
            if seen.is_ready and not seen.is_lost
        )


def _most_common(found: Collection[Description]) -> Description:
    """What most replicas have, of several the older."""
    votes = Counter((one.current.version_id, one.current.digest) for one in found)
    chosen = min(votes, key=lambda key: (-votes[key], key[0]))
    return next(one for one in found if (one.current.version_id, one.current.digest) == chosen)
