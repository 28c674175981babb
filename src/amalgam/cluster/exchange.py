"""Other weights for replicas: for all of them or none, or for one that lacks what the others have.

In: what is asked for, replicas. Out: the same version in all of them. Must never know: what was before, why it changes.

    prepare   every replica builds the version and keeps it beside the one in use; the number is free in all of them
    compare   what they have built is the same
    go live   new requests wait for a moment; every replica exchanges one version for the other between two steps
    discard   nothing is kept for this change any more

If a replica cannot prepare, or has gone, the others discard what they have built: nothing has changed anywhere. If one
cannot go live, all that have answered go back to the version before, which they still have: that one too, for an error
does not tell whether it came before the exchange or after it. A replica that dies while others go live is no reason to
go back. Nor is one that does not answer in time: it gets no requests before new ones go on, so that nobody sees two
versions.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager

from amalgam.cluster.interface import Description, ReplicaState, Weights
from amalgam.cluster.members import Interrupted, Members, Outcomes
from amalgam.cluster.routing import Routing
from amalgam.errors import AmalgamError, ConflictError, UnavailableError, VersionNotFoundError
from amalgam.runtime.changes import ChangeRequest, RemapResult
from amalgam.runtime.jobs import Job

HOLD_SECONDS = 10.0  # how long requests wait for a replica that hangs while it goes live


class Exchange:
    """See above. Blocking; any thread but the event loop's.

    Args:
        routing: is told which replicas may not have requests.
        holding: keeps new requests waiting as long as its context lasts.
        hold_seconds: what replicas have to go live before the others go on without them.
    """

    def __init__(
        self,
        members: Members,
        routing: Routing,
        holding: Callable[[], AbstractContextManager[None]],
        hold_seconds: float = HOLD_SECONDS,
    ) -> None:
        self._members = members
        self._routing = routing
        self._holding = holding
        self._hold_seconds = hold_seconds

    def make(
        self, job: Job, ids: Collection[str], request: ChangeRequest, before: Weights, name: str | None
    ) -> tuple[RemapResult, str]:
        """Put a version into use, or give it a name, in all of these replicas or in none.

        Args:
            request: with a number that is free in all of them.
            before: what is in use.

        Returns:
            what one of them has made, and the digest of the version.

        Raises:
            AmalgamError: a replica could not, or the change was cancelled; nothing has changed.
        """
        keep_as = _temporary()
        try:
            made = self._prepared(job, ids, request, keep_as)
            result, digest = next(iter(made.values()))
            _check_alike(made)
            job.go_live()
            with self._holding():
                self._go_live(ids, result.version, before, name)
        finally:
            self._members.all(ids, "discard", seconds=self._hold_seconds)
        return result, digest

    def go_back(self, ids: Collection[str], before: Weights) -> None:
        """Let new requests start on what replicas have kept; one that has not kept it is set aside."""
        with self._holding():
            back = self._members.all(ids, "go_live", before.version_id, seconds=self._hold_seconds)
            self.set_aside(set(ids).difference(back.results))

    def bring(self, replica_id: str, current: Weights, named: Mapping[str, Weights]) -> None:
        """Give one replica what all have.

        Raises:
            AmalgamError: it could not be.
        """
        self._members.call(replica_id, "discard")  # of a change in which it came too late
        has: Description = self._members.call(replica_id, "describe")
        for name in has.named.keys() - named.keys():
            self._members.call(replica_id, "remove_name", name)
        for name, weights in named.items():
            if has.named.get(name) != weights:
                self._give(replica_id, weights, name)
        if not is_same(has.current, current):
            self._give(replica_id, current, None)

    def set_aside(self, ids: Collection[str]) -> None:
        """Replicas get no requests until they have been brought to what the others have."""
        for replica_id in ids:
            self._routing.set_ready(replica_id, is_ready=False)

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
            AmalgamError: a replica could not, and all are back on the version before, or get no requests.
        """
        outcomes = self._members.all(ids, "go_live", version_id, name, name is None, seconds=self._hold_seconds)
        self.set_aside(outcomes.late)
        if outcomes.errors or not outcomes.results:
            self._put_back(outcomes.results.keys() | outcomes.errors.keys(), before, name)
            self._check(outcomes, len(ids), "take the new weights into use")

    def _put_back(self, ids: Collection[str], before: Weights, name: str | None) -> None:
        """Undo a change where it may have been made; a replica that cannot is set aside."""
        if name is None:
            back = self._members.all(ids, "go_live", before.version_id, None, True, seconds=self._hold_seconds)
            are_back = set(back.results)
        else:
            back = self._members.all(ids, "remove_name", name, seconds=self._hold_seconds)
            unnamed = {one for one, error in back.errors.items() if isinstance(error, VersionNotFoundError)}
            are_back = unnamed.union(back.results)
        self.set_aside(set(ids) - are_back)

    def _check(self, outcomes: Outcomes, num_replicas: int, what: str) -> None:
        """
        Raises:
            AmalgamError: of the first replica that failed, with a note that tells which.
            UnavailableError: a replica has gone, or hangs.
        """
        for replica_id, error in outcomes.errors.items():
            error.add_note(f"Replica {replica_id} of {num_replicas} could not {what}; no replica has changed")
            raise error
        for replica_id in outcomes.lost:
            raise UnavailableError(
                f"Replica {replica_id} of {num_replicas} has gone before it could {what}; no replica has changed.",
                remedy="Try again when it has been replaced.",
            )
        for replica_id in outcomes.late:
            raise UnavailableError(
                f"Replica {replica_id} of {num_replicas} did not {what} within {self._hold_seconds:g} s; "
                "no replica has changed.",
                remedy="Try again when it answers, or has been replaced.",
            )


def _check_alike(made: Mapping[str, tuple[RemapResult, str]]) -> None:
    digests = {digest for _, digest in made.values()}
    numbers = {result.version for result, _ in made.values()}
    if len(digests) > 1 or len(numbers) > 1:
        raise ConflictError(
            f"{len(made)} replicas have made {max(len(digests), len(numbers))} different versions of one change; "
            "no replica has changed.",
            remedy="All replicas need the same checkpoints.",
        )


def is_same(one: Weights, other: Weights) -> bool:
    return (one.version_id, one.digest) == (other.version_id, other.digest)


def _temporary() -> str:
    """A name that keeps a version until it goes live."""
    return f"preparing-{secrets.token_hex(4)}"
