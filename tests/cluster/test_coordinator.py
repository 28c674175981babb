"""One change of all replicas: all of them, or none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amalgam.cluster.coordinator import Coordinator
from amalgam.cluster.interface import Weights
from amalgam.cluster.members import Members
from amalgam.cluster.routing import Routing
from amalgam.errors import (
    AmalgamError,
    CancelledError,
    ConflictError,
    OutOfMemoryError,
    UnavailableError,
    VersionNotFoundError,
)
from amalgam.runtime.changes import MAX_UNDOS, ChangeRequest, RemapResult
from amalgam.runtime.history import HistoryFile
from tests.cluster.replicas import RULES, ForeignError, LocalTransport, ScriptedMember, no_such_source
from tests.errors import raises

MAPPING = ChangeRequest(mapping={"b": "fp8"})


class Cluster:
    """Scripted members in an event loop of their own, and who coordinates them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, names: str = "abc", history: Path | None = None) -> None:
        self.members = {name: ScriptedMember() for name in names}
        self.loop, self.history = loop, history
        self.transport = LocalTransport(self.members, Routing(4))
        self.num_held = 0
        self.replace_coordinator()

    def replace_coordinator(self, *, resumes: bool = False, hold_seconds: float = 60.0) -> None:
        """Another one begins, that knows what the replicas and the history tell."""
        self.routing = self.transport.routing = Routing(4)
        history = None if self.history is None else HistoryFile(self.history)
        self.coordinator = Coordinator(
            Members(self.transport, self.loop),
            self.routing,
            self.holding,
            history,
            resumes=resumes,
            retry_seconds=0.0,
            hold_seconds=hold_seconds,
        )
        self.has_begun = False
        self.look()

    @contextmanager
    def holding(self) -> Iterator[None]:
        self.num_held += 1
        yield

    def look(self) -> None:
        """What the gateway does again and again."""
        alive = {name: self.members[name].state() for name in self.transport.ids()}
        self.routing.update(alive, time.monotonic(), gone=set(self.routing.replicas) - alive.keys())
        self.has_begun = self.has_begun or self.coordinator.begin()
        if self.has_begun:
            self.coordinator.look_after()

    def put_on_probation(self, *names: str) -> None:
        """The current version has yet to answer in these replicas, and has in the others."""
        for name, member in self.members.items():
            member.is_on_probation = name in names

    @property
    def versions(self) -> dict[str, int]:
        return {name: self.members[name].current.version_id for name in self.transport.ids()}

    @property
    def ready(self) -> set[str]:
        return {name for name, seen in self.routing.replicas.items() if seen.is_ready}


@pytest.fixture
def cluster(loop: asyncio.AbstractEventLoop) -> Cluster:
    return Cluster(loop)


def unchanged(cluster: Cluster) -> bool:
    """New requests start where they did, and nothing is kept for a change."""
    members = [member for member in cluster.members.values() if not member.is_dead]
    return (
        all(member.current.version_id == 1 and not member.temporary and not member.named for member in members)
        and cluster.coordinator.version_id == 1
        and cluster.coordinator.rules == RULES
    )


def test_all_replicas_change(cluster: Cluster) -> None:
    result = cluster.coordinator.change(MAPPING)
    assert (result.version, result.previous_version) == (2, 1)
    assert cluster.versions == {"a": 2, "b": 2, "c": 2}
    assert all(not member.temporary for member in cluster.members.values())
    assert cluster.num_held == 1
    assert [rule.pattern for rule in cluster.coordinator.rules] == ["a.*", "b"]
    assert [record.error for record in cluster.coordinator.log.read()] == [None]


@pytest.mark.parametrize("failure", [no_such_source(), OutOfMemoryError("No memory.")])
def test_a_replica_that_cannot_prepare_keeps_all_as_they_are(cluster: Cluster, failure: AmalgamError) -> None:
    cluster.members["b"].fails["prepare"] = failure
    with pytest.raises(type(failure)) as raised:
        cluster.coordinator.change(MAPPING)
    assert "Replica b" in raised.value.__notes__[0]
    assert unchanged(cluster)
    assert cluster.num_held == 0
    cluster.coordinator.change(MAPPING)  # and the next one succeeds, under a number that is free everywhere
    assert set(cluster.versions.values()) == {3}


@pytest.mark.parametrize("failure", [UnavailableError("closed"), ForeignError("closed"), TimeoutError("closed")])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize("name", [None, "fast"])
def test_a_replica_that_cannot_go_live_takes_all_others_back(
    cluster: Cluster, failure: Exception, is_late: bool, name: str | None
) -> None:
    """Whatever it raises, before it has gone live or after it."""
    member = cluster.members["c"]
    (member.fails_late if is_late else member.fails)["go_live"] = failure
    with raises(UnavailableError, "closed" if isinstance(failure, UnavailableError) else type(failure).__name__):
        cluster.coordinator.change(replace(MAPPING, name=name))
    assert unchanged(cluster)
    assert cluster.ready == {"a", "b", "c"}


def test_one_that_neither_goes_live_nor_back_gets_no_requests_until_it_is_there(cluster: Cluster) -> None:
    member = cluster.members["c"]
    go_live = member.go_live

    def failing(version_id: int, *more: Any) -> RemapResult:
        if version_id != 1:
            go_live(version_id, *more)
        raise ForeignError

    member.go_live = failing  # type: ignore[assignment, method-assign]
    with raises(UnavailableError, "ForeignError"):
        cluster.coordinator.change(MAPPING)
    assert (cluster.versions, cluster.ready) == ({"a": 1, "b": 1, "c": 2}, {"a", "b"})
    member.go_live = go_live  # type: ignore[method-assign]
    cluster.look()
    assert cluster.ready == {"a", "b", "c"}
    assert unchanged(cluster)


def test_a_replica_that_dies_while_it_prepares_ends_the_change(cluster: Cluster) -> None:
    cluster.members["b"].fails["prepare"] = True
    with raises(UnavailableError, "b"):
        cluster.coordinator.change(MAPPING)
    assert unchanged(cluster)


def test_a_replica_that_dies_as_others_go_live_does_not_take_them_back(cluster: Cluster) -> None:
    cluster.members["b"].fails["go_live"] = True
    cluster.coordinator.change(MAPPING)
    assert cluster.versions == {"a": 2, "c": 2}


def test_replicas_that_make_something_else_are_refused(cluster: Cluster) -> None:
    cluster.members["b"].digest_of = lambda request: "other files"
    with raises(ConflictError, "2"):
        cluster.coordinator.change(MAPPING)
    assert unchanged(cluster)


def test_a_new_replica_gets_requests_when_it_has_the_weights_of_all(cluster: Cluster) -> None:
    cluster.coordinator.change(MAPPING)
    cluster.coordinator.change(ChangeRequest(rules=RULES, name="fast"))
    late = cluster.members["d"] = ScriptedMember()
    late.fails["prepare"] = OutOfMemoryError("Not yet.")
    cluster.look()
    assert cluster.ready == {"a", "b", "c"}
    cluster.look()
    assert cluster.ready == {"a", "b", "c", "d"}
    assert (late.current.version_id, late.named["fast"].version_id) == (2, 3)


def test_one_that_has_other_files_gets_no_requests(cluster: Cluster) -> None:
    cluster.coordinator.change(MAPPING)
    cluster.members["d"] = ScriptedMember(digest_of=lambda request: "other files")
    cluster.look()
    assert cluster.ready == {"a", "b", "c"}


@pytest.mark.parametrize("is_replaced", [False, True])
def test_if_one_replica_leaves_a_version_all_do(cluster: Cluster, is_replaced: bool) -> None:
    cluster.coordinator.change(MAPPING)
    cluster.put_on_probation("b")  # the others have shown that they answer, and keep what they may have to go back to
    cluster.look()
    if is_replaced:
        cluster.replace_coordinator()
    cluster.members["b"].leave()
    for _ in range(3):
        cluster.look()
    assert cluster.versions == {"a": 1, "b": 1, "c": 1}
    assert cluster.ready == {"a", "b", "c"}
    assert (cluster.coordinator.version_id, cluster.coordinator.num_failed_versions) == (1, 1)
    assert all(member.before is None for member in cluster.members.values())
    job = cluster.coordinator.jobs.read()[-1]
    assert (job.kind, job.state, job.version, job.previous_version) == ("failed_version", "failed", 1, 2)


def test_one_that_has_lost_the_version_before_is_not_ready_until_it_is_there(cluster: Cluster) -> None:
    cluster.coordinator.change(MAPPING)
    cluster.put_on_probation("b")
    cluster.look()
    cluster.members["c"].release()
    cluster.members["c"].fails["prepare"] = OutOfMemoryError("Not yet.")
    cluster.members["b"].leave()
    cluster.look()
    assert (cluster.coordinator.version_id, cluster.ready) == (1, {"a", "b"})
    cluster.look()
    assert cluster.ready == {"a", "b"}
    cluster.look()
    assert cluster.ready == {"a", "b", "c"}
    assert cluster.versions == {"a": 1, "b": 1, "c": 1}


def test_the_version_before_is_kept_until_none_has_doubts(cluster: Cluster) -> None:
    cluster.coordinator.change(MAPPING)
    for doubting in ("ab", "b"):
        cluster.put_on_probation(*doubting)
        cluster.look()
        assert all(member.before is not None for member in cluster.members.values())
    cluster.coordinator.change(ChangeRequest(mapping={"c": "fp8"}))  # nobody knows whether version 2 answers
    cluster.put_on_probation("b")
    cluster.look()
    assert [member.before.version_id for member in cluster.members.values() if member.before is not None] == [1, 1, 1]
    cluster.put_on_probation()
    cluster.look()
    assert all(member.before is None for member in cluster.members.values())


def test_one_that_leaves_what_answers_in_all_others_is_alone(cluster: Cluster) -> None:
    cluster.coordinator.change(MAPPING)
    cluster.look()
    late = cluster.members["d"] = ScriptedMember()
    cluster.look()
    late.before = late.kept[1]
    late.leave()
    cluster.look()
    assert cluster.versions == {"a": 2, "b": 2, "c": 2, "d": 1}
    assert cluster.ready == {"a", "b", "c"}
    assert cluster.coordinator.num_failed_versions == 1
    cluster.look()
    assert cluster.versions["d"] == 2
    assert cluster.ready == {"a", "b", "c", "d"}


def test_one_that_hangs_as_others_go_live_is_not_waited_for(cluster: Cluster) -> None:
    hanging = cluster.members["b"]
    hanging.hangs["go_live"] = asyncio.Event()
    ready_when_requests_go_on = set()
    holding = cluster.holding

    @contextmanager
    def watched() -> Iterator[None]:
        with holding():
            yield
        ready_when_requests_go_on.update(cluster.ready)

    cluster.holding = watched  # type: ignore[method-assign]
    cluster.replace_coordinator(hold_seconds=1.0)
    assert cluster.coordinator.change(MAPPING).version == 2
    assert ready_when_requests_go_on == {"a", "c"}
    assert cluster.versions == {"a": 2, "b": 1, "c": 2}
    cluster.loop.call_soon_threadsafe(hanging.hangs.pop("go_live").set)
    cluster.look()
    assert cluster.ready == {"a", "b", "c"}
    assert set(cluster.versions.values()) == {2}


def test_a_coordinator_goes_on_from_the_history(loop: asyncio.AbstractEventLoop, tmp_path: Path) -> None:
    cluster = Cluster(loop, history=tmp_path / "h.jsonl")
    cluster.coordinator.change(MAPPING)
    cluster.coordinator.change(ChangeRequest(mapping={"c": "fp8"}))
    cluster.coordinator.note_answered({3})
    cluster.coordinator.close()
    cluster.replace_coordinator()
    coordinator = cluster.coordinator
    assert coordinator.version_id == 3
    assert [job.version for job in coordinator.jobs.read()] == [1, 2, 3]
    assert coordinator.rollback().version == 2
    assert coordinator.rollback(1).version == 4  # what its rules give, for nobody has kept it
    assert coordinator.rules == RULES
    coordinator.close()


@pytest.mark.parametrize("resumes", [False, True])
def test_replicas_that_have_just_begun_get_a_number_that_is_new(
    loop: asyncio.AbstractEventLoop, tmp_path: Path, resumes: bool
) -> None:
    before = Cluster(loop, history=tmp_path / "h.jsonl")
    before.coordinator.change(MAPPING)
    before.coordinator.change(ChangeRequest(rules=RULES, name="fast"))
    before.coordinator.close()
    after = Cluster(loop, "", history=tmp_path / "h.jsonl")
    after.members |= {name: ScriptedMember() for name in "ab"}
    after.coordinator.close()
    after.replace_coordinator(resumes=resumes)
    assert set(after.versions.values()) == {4}
    assert [rule.pattern for rule in after.coordinator.rules] == (["a.*", "b"] if resumes else ["a.*"])
    assert after.ready == {"a", "b"}
    after.coordinator.close()


def test_rules_that_cannot_be_fulfilled_any_more_are_not_resumed(
    loop: asyncio.AbstractEventLoop, tmp_path: Path
) -> None:
    before = Cluster(loop, history=tmp_path / "h.jsonl")
    before.coordinator.change(MAPPING)
    before.coordinator.close()
    after = Cluster(loop, "", history=tmp_path / "h.jsonl")
    after.members["a"] = ScriptedMember(fails={"prepare": no_such_source()})
    after.coordinator.close()
    after.replace_coordinator(resumes=True)
    assert (after.versions, after.coordinator.rules) == ({"a": 3}, RULES)
    after.coordinator.close()


def test_back_and_forth(cluster: Cluster) -> None:
    coordinator = cluster.coordinator
    with raises(ConflictError, MAX_UNDOS):
        coordinator.undo(1)
    with raises(ConflictError):
        coordinator.rollback()
    coordinator.change(MAPPING)
    coordinator.change(ChangeRequest(mapping={"c": "fp8"}))
    assert coordinator.rollback().version == 2
    assert coordinator.rollback(3).version == 3
    assert coordinator.undo(3).version == 4  # the rules of version 2, as a version of their own
    assert [rule.pattern for rule in coordinator.rules] == ["a.*", "b"]
    with raises(ConflictError, "3"):
        coordinator.undo(3)
    with raises(VersionNotFoundError, "77"):
        coordinator.rollback(77)
    assert set(cluster.versions.values()) == {4}


def test_names_are_everywhere_or_nowhere(cluster: Cluster) -> None:
    named = ChangeRequest(mapping={"b": "fp8"}, name="fast")
    cluster.members["c"].fails["go_live"] = UnavailableError("It is closed.")
    with raises(UnavailableError, "closed"):
        cluster.coordinator.change(named)
    assert unchanged(cluster)
    cluster.coordinator.change(named)
    assert all(member.named["fast"].version_id == 3 for member in cluster.members.values())
    assert cluster.coordinator.remove_name("fast") == 3
    assert unchanged(cluster)
    with raises(VersionNotFoundError, "fast"):
        cluster.coordinator.remove_name("fast")


def test_a_change_can_be_cancelled(cluster: Cluster) -> None:
    slow = cluster.members["b"]
    prepare = slow.prepare

    def cancelling(*args: object) -> object:
        running = cluster.coordinator.jobs.running
        assert running is not None
        running.cancel()
        return prepare(*args)  # type: ignore[arg-type]

    slow.prepare = cancelling  # type: ignore[assignment, method-assign]
    with raises(CancelledError, "cancelled"):
        cluster.coordinator.change(MAPPING)
    assert unchanged(cluster)


def test_who_begins_anew_goes_by_what_most_replicas_have(loop: asyncio.AbstractEventLoop) -> None:
    before = Cluster(loop)
    newer = Weights(2, RULES, "d2")
    for name in "ab":
        member = before.members[name]
        member.kept, member.current, member.coming_id = {1: member.current}, newer, 3
    before.replace_coordinator()
    assert before.coordinator.version_id == 2
    assert set(before.versions.values()) == {2}
    assert before.ready == {"a", "b", "c"}


def test_nobody_changes_nothing(loop: asyncio.AbstractEventLoop) -> None:
    cluster = Cluster(loop, "")
    with raises(UnavailableError, "replica"):
        cluster.coordinator.change(MAPPING)
