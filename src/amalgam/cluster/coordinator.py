"""One change of the weights of all replicas: all of them, or none.

In: what is asked for. Out: the same version, under one number, in all replicas. Must never know: HTTP, what carries
calls.

    prepare   every replica builds the version and keeps it beside the one in use; the number is free in all of them
    compare   what they have built is the same
    go live   new requests wait for a moment; every replica exchanges one version for the other between two steps
    discard   nothing is kept for this change any more

If a replica cannot prepare, or has gone, the others discard what they have built: nothing has changed anywhere. If one
cannot go live, those that have go back to the version before, which they still have. A replica that dies while others
go live is no reason to go back: whatever comes in its place begins with the version that the others have, for no
replica gets requests before it has it. And if a version turns out to compute NaN in one replica, which goes back by
itself (`engine.probation`), all others go back, too.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from amalgam.cluster.interface import Description, ReplicaState, Weights
from amalgam.cluster.members import Interrupted, Members, Outcomes
from amalgam.cluster.routing import Routing
from amalgam.config.names import CURRENT
from amalgam.config.settings import Rule
from amalgam.errors import AmalgamError, ConflictError, UnavailableError, VersionNotFoundError
from amalgam.runtime.changes import ChangeRequest, RemapLog, RemapRecord, RemapResult
from amalgam.runtime.jobs import Job, Jobs
from amalgam.runtime.versions import as_id, check_name

MAX_UNDOS = 64
RETRY_SECONDS = 5.0

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
        retry_seconds: until a replica that could not be brought to the others' weights is tried again.
    """

    def __init__(
        self,
        members: Members,
        routing: Routing,
        holding: Callable[[], AbstractContextManager[None]],
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._members = members
        self._routing = routing
        self._holding = holding
        self._retry_seconds = retry_seconds
        self._lock = threading.RLock()  # one change, or one look after the replicas, at a time
        self._goal: _Goal | None = None
        self._next_id = 2
        self._earlier: list[Weights] = []  # that new requests started on, the latest last
        self._known: dict[int, Weights] = {}  # every version that there has been
        self._num_left: dict[str, int] = {}
        self._retry_at: dict[str, float] = {}
        self.num_failed_versions = 0
        self.jobs = Jobs(lambda: self.version_id)
        self.log = RemapLog()

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
        votes: dict[tuple[int, str], int] = {}
        for description in found.values():
            key = description.current.version_id, description.current.digest
            votes[key] = votes.get(key, 0) + 1
        version_id, digest = min(votes, key=lambda key: (-votes[key], key[0]))
        chosen = next(
            one for one in found.values() if (one.current.version_id, one.current.digest) == (version_id, digest)
        )
        self._goal = _Goal(chosen.current, dict(chosen.named))
        self._known = {weights.version_id: weights for weights in (chosen.current, *chosen.named.values())}
        start = RemapRecord(0.0, version_id, version_id, 0, 0, 0.0, rules=chosen.current.rules)
        self.log.start(start)
        return True

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
            states: Mapping[str, ReplicaState] = self._members.all(self._members.ids(), "state").results
            for replica_id, state in states.items():
                seen = self._routing.replicas.get(replica_id)
                if seen is None or seen.is_lost:
                    continue
                self._next_id = max(self._next_id, state.coming_id)
                if seen.is_ready and state.version_id != self.version_id and self._has_left(replica_id, state):
                    self._follow_back(replica_id)
                    return
                self._num_left[replica_id] = state.num_left
                if not self._is_there(state):
                    seen.is_ready = False
                if not seen.is_ready and time.monotonic() >= self._retry_at.get(replica_id, 0.0):
                    self._bring(replica_id)
        finally:
            self._lock.release()

    def _is_there(self, state: ReplicaState) -> bool:
        assert self._goal is not None
        wanted = {name: weights.version_id for name, weights in self._goal.named.items()}
        return state.version_id == self.version_id and dict(state.names) == wanted

    def _has_left(self, replica_id: str, state: ReplicaState) -> bool:
        return state.num_left > self._num_left.get(replica_id, 0)

    def _bring(self, replica_id: str) -> None:
        """Give a replica the weights that all have."""
        assert self._goal is not None
        goal = self._goal
        try:
            has: Description = self._members.call(replica_id, "describe")
            for name in has.named.keys() - goal.named.keys():
                self._members.call(replica_id, "remove_name", name)
            for name, weights in goal.named.items():
                if has.named.get(name) != weights:
                    self._give(replica_id, weights, name)
            if (has.current.version_id, has.current.digest) != (goal.current.version_id, goal.current.digest):
                self._give(replica_id, goal.current, None)
        except AmalgamError as error:
            self._retry_at[replica_id] = time.monotonic() + self._retry_seconds
            logger.warning("replica %s cannot have weight version %d: %s", replica_id, goal.current.version_id, error)
            return
        self._retry_at.pop(replica_id, None)
        self._routing.replicas[replica_id].is_ready = True
        logger.info("replica %s is ready with weight version %d", replica_id, goal.current.version_id)

    def _give(self, replica_id: str, weights: Weights, name: str | None) -> None:
        keep_as = _temporary()
        state: ReplicaState = self._members.call(replica_id, "state")
        if weights.version_id in state.kept_ids:
            request = ChangeRequest(version=weights.version_id)
        else:
            request = ChangeRequest(rules=weights.rules, version_id=weights.version_id)
        try:
            _, digest = self._members.call(replica_id, "prepare", request, keep_as)
            if digest != weights.digest:
                raise ConflictError(
                    f"Weight version {weights.version_id} would be something else there than in other replicas.",
                    remedy="All replicas need the same checkpoints.",
                )
            self._members.call(replica_id, "go_live", weights.version_id, name)
        finally:
            self._members.call(replica_id, "discard")

    def _follow_back(self, replica_id: str) -> None:
        """A replica has gone back by itself: all others do the same."""
        before, failed = self._earlier[-1] if self._earlier else None, self.current
        self.num_failed_versions += 1
        if before is None:
            return
        reason = f"version {failed.version_id} could not answer in replica {replica_id}"
        logger.warning("%s: all replicas go back to version %d", reason, before.version_id)
        with self._holding():
            self._members.all(self._ready_ids(), "go_live", before.version_id, None)
        assert self._goal is not None
        self._goal = replace(self._goal, current=before)
        self._earlier.pop()
        self.log.add_failed_version(before.version_id, before.rules, failed.version_id, reason)

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
            if not self._earlier:
                raise ConflictError("There is no earlier version to go back to.", remedy="Name one that is kept.")
            earlier = list(self._earlier)
            result = self._make(job, ChangeRequest(version=earlier[-1].version_id))
            self._earlier = earlier[:-1]
            return result

    def undo(self, version_id: int) -> RemapResult:
        """See `Deployment.undo_weight_mapping`."""
        with self._change("undo", f"back from version {version_id}") as job:
            if version_id != self.version_id:
                raise ConflictError(
                    f"Weight version {version_id} is not in use any more: {self.version_id} is.",
                    remedy="Look at what has changed since, then undo that version.",
                )
            if not self._earlier:
                raise ConflictError("No change of the weight mapping is left to undo.")
            earlier = list(self._earlier)
            result = self._make(job, ChangeRequest(rules=earlier[-1].rules))
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
        request, name = self._resolved(request, ids), request.name
        keep_as = _temporary()
        try:
            made = self._prepared(job, ids, request, keep_as)
            result, digest = next(iter(made.values()))
            self._check_alike(made)
            job.go_live()
            with self._holding():
                self._go_live(ids, result.version, before, name)
        finally:
            self._members.all(ids, "discard")
        self._next_id = max(self._next_id, result.version + 1)
        rules = request.rules_after(before.rules) if request.version is None else self._known[result.version].rules
        self._note_live(Weights(result.version, rules, digest), before, name)
        result = replace(result, previous_version=before.version_id, seconds=time.monotonic() - started, name=name)
        self.log.add(result, rules, job.asked)
        job.result = result
        return result

    def _resolved(self, request: ChangeRequest, ids: Collection[str]) -> ChangeRequest:
        """The same without what only some replicas know, and with a number that is free in all of them.

        Raises:
            VersionNotFoundError: nobody knows the version that is to come back.
        """
        states: Mapping[str, ReplicaState] = self._members.all(ids, "state").results
        coming = max([self._next_id, *(state.coming_id for state in states.values())])
        if request.version is None:
            return replace(request, name=None, version_id=coming)
        version_id = self._id_of(request.version)
        if all(version_id in state.kept_ids for state in states.values()):
            return ChangeRequest(version=version_id)
        known = self._known.get(version_id)
        if known is None:
            raise VersionNotFoundError(
                f"Nobody knows weight version {request.version}.", remedy="GET /weights/changes tells of earlier ones."
            )
        return ChangeRequest(rules=known.rules, version_id=coming)

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

    def _prepared(
        self, job: Job, ids: Collection[str], request: ChangeRequest, keep_as: str
    ) -> Mapping[str, tuple[RemapResult, str]]:
        """What all replicas have built.

        Raises:
            AmalgamError: one could not, or the change was cancelled.
        """

        def check(num_done: int) -> None:
            try:
                job.report(f"Preparing {len(ids)} replicas", num_done, len(ids))
            except AmalgamError:
                self._members.all(ids, "cancel")
                raise

        check(0)
        try:
            outcomes = self._members.all(ids, "prepare", request, keep_as, while_waiting=check)
        except Interrupted as interruption:
            raise interruption.__cause__ or interruption from None
        self._check(outcomes, len(ids), "prepare the change")
        return outcomes.results

    def _go_live(self, ids: Collection[str], version_id: int, before: Weights, name: str | None) -> None:
        """
        Raises:
            AmalgamError: a replica could not, and those that had are back on the version before.
        """
        outcomes = self._members.all(ids, "go_live", version_id, name)
        if outcomes.errors or not outcomes.results:
            done = list(outcomes.results)
            if name is None:
                back = self._members.all(done, "go_live", before.version_id, None)
            else:
                back = self._members.all(done, "remove_name", name)
            for replica_id in back.errors:  # it gets no requests until it has been brought back
                self._routing.replicas[replica_id].is_ready = False
            self._check(outcomes, len(ids), "take the new weights into use")

    def _check(self, outcomes: Outcomes, num_replicas: int, what: str) -> None:
        """
        Raises:
            AmalgamError: of the first replica that failed, with a note that tells which.
            UnavailableError: a replica has gone.
        """
        for replica_id, error in outcomes.errors.items():
            error.add_note(f"Replica {replica_id} of {num_replicas} could not {what}; no replica has changed")
            raise error
        for replica_id in outcomes.lost:
            raise UnavailableError(
                f"Replica {replica_id} of {num_replicas} has gone before it could {what}; no replica has changed.",
                remedy="Try again when it has been replaced.",
            )

    def _check_alike(self, made: Mapping[str, tuple[RemapResult, str]]) -> None:
        digests = {digest for _, digest in made.values()}
        numbers = {result.version for result, _ in made.values()}
        if len(digests) > 1 or len(numbers) > 1:
            raise ConflictError(
                f"{len(made)} replicas have made {max(len(digests), len(numbers))} different versions of one change; "
                "no replica has changed.",
                remedy="All replicas need the same checkpoints.",
            )

    def _note_live(self, weights: Weights, before: Weights, name: str | None) -> None:
        assert self._goal is not None
        self._known[weights.version_id] = weights
        if name is not None:
            self._goal = replace(self._goal, named={**self._goal.named, name: weights})
            return
        self._goal = replace(self._goal, current=weights)
        if weights.version_id != before.version_id:
            self._earlier = [*self._earlier, before][-MAX_UNDOS:]

    def _ready_ids(self) -> list[str]:
        return sorted(
            replica_id for replica_id, seen in self._routing.replicas.items() if seen.is_ready and not seen.is_lost
        )


def _temporary() -> str:
    """A name that keeps a version until it goes live."""
    return f"preparing-{secrets.token_hex(4)}"
