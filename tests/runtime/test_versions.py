"""The book of versions, beside an engine that only counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from weakref import finalize, ref

import pytest
import torch

from amalgam.engine.probation import FailedVersion
from amalgam.errors import AmalgamError, ConflictError, RequestError, VersionNotFoundError
from amalgam.kernels.layouts import dense
from amalgam.models.weights import WeightVersion
from amalgam.runtime import versions
from amalgam.runtime.served import ServedWeights
from amalgam.runtime.versions import VersionBook
from tests.errors import raises


class CountingEngine:
    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.kept: frozenset[int] = frozenset()
        self.current = 0
        self.on_left: Callable[[int], None] | None = None
        self.on_version_failed: Callable[[FailedVersion], None] | None = None
        self.fallback: WeightVersion | None = None

    def set_version(self, version: WeightVersion) -> None:
        self.current = version.version_id

    def prepare(self, version: WeightVersion) -> None:
        pass

    def watch(self, candidate: WeightVersion) -> None:
        pass

    def unwatch(self, candidate: WeightVersion) -> None:
        pass

    def keep(self, version_ids: frozenset[int]) -> None:
        self.kept = version_ids

    def status(self) -> Any:
        return SimpleNamespace(versions=dict(self.requests))


class Stand:
    """A book, its engine, and how often memory has gone back to the system."""

    def __init__(self, engine: CountingEngine | None = None) -> None:
        self.engine = engine or CountingEngine()
        self.freed = threading.Semaphore(0)
        self.book = VersionBook(self.made(1), self.engine, self.freed.release)  # type: ignore[arg-type]

    def made(self, version_id: int) -> ServedWeights:
        weights = {"layers.0.mlp.up": dense(torch.zeros(4))}
        return ServedWeights(None, WeightVersion(version_id, weights, {}, {}), ())  # type: ignore[arg-type]

    def states(self) -> dict[int, str]:
        return {live.served.version_id: " ".join(live.states) for live in self.book.live()}


@pytest.fixture
def stand() -> Iterator[Stand]:
    stand = Stand()
    yield stand
    stand.book.close()


def test_a_version_is_kept_for_what_it_is_kept_for(stand: Stand) -> None:
    book, engine = stand.book, stand.engine
    assert (book.next_id(), book.next_id()) == (2, 3)
    request = book.current.version
    book.make_current(stand.made(3))
    assert engine.current == 3 and stand.states() == {3: "current", 1: "draining"}
    book.pin(1)
    del request
    book.name("careful", stand.made(4))
    book.add_candidate(stand.made(5))
    assert stand.states() == {3: "current", 5: "candidate", 4: "named", 1: "pinned"}
    assert engine.kept == {1, 3, 4, 5}
    assert [book.find(asked).version_id for asked in ("current", "careful", "4", 1, "5")] == [3, 4, 4, 1, 5]
    book.pin(4)
    book.remove_name("careful")
    assert stand.states()[4] == "pinned"


def test_what_is_kept_is_known_to_the_engine_before_another_version_takes_its_place(stand: Stand) -> None:
    stand.book.pin(1)
    kept: list[frozenset[int]] = []
    stand.engine.set_version = lambda version: kept.append(stand.engine.kept)  # type: ignore[method-assign]
    stand.book.make_current(stand.made(2))
    assert 1 in kept[0]  # or what it has computed of beginnings would be forgotten


def test_what_takes_no_requests_is_not_found(stand: Stand) -> None:
    book, _request = stand.book, stand.book.current.version
    book.make_current(stand.made(2))
    for asked in ("nobody", "9", 1, "1", "9" * 5000, "²"):
        with pytest.raises(VersionNotFoundError):
            book.find(asked)
    with raises(VersionNotFoundError, 9):
        book.pin(9)
    with raises(VersionNotFoundError, 2):
        book.unpin(2)
    with raises(VersionNotFoundError, "nobody"):
        book.remove_name("nobody")


@pytest.mark.parametrize("name", ["", "7", "current", "a b", ".hidden", "x" * 65, "../up", "名"])
def test_a_name_is_one_that_requests_can_write(stand: Stand, name: str) -> None:
    with pytest.raises(RequestError):
        stand.book.name(name, stand.book.current)


def test_weights_are_freed_when_nobody_holds_their_version_any_more(stand: Stand) -> None:
    """And in the thread that is there for it, whoever lets go last."""
    book, threads = stand.book, []
    request = book.current.version
    finalize(request["layers.0.mlp.up"], lambda: threads.append(threading.current_thread().name))
    book.make_current(stand.made(2))
    assert stand.states() == {2: "current", 1: "draining"} and not stand.freed.acquire(blocking=False)
    del request
    assert stand.freed.acquire(timeout=60)
    assert threads == ["amalgam-versions"] and stand.states() == {2: "current"}


def test_a_draining_version_can_come_back(stand: Stand) -> None:
    book, request = stand.book, stand.book.current.version
    book.make_current(stand.made(2))
    book.pin(1)
    del request
    assert stand.states() == {2: "current", 1: "pinned"}
    book.make_current(book.find(1))
    book.unpin(1)
    assert stand.freed.acquire(timeout=60)  # the other one
    assert stand.states() == {1: "current"}


def test_a_name_that_passes_on_lets_its_version_go(stand: Stand) -> None:
    book = stand.book
    book.name("plan", stand.made(2))
    old = ref(book.find("plan").version)
    book.name("plan", stand.made(3))
    assert stand.freed.acquire(timeout=60)
    assert old() is None and stand.states() == {1: "current", 3: "named"}


def test_as_many_are_kept_as_there_may_be(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "MAX_KEPT", 2)
    book = stand.book
    book.name("a", stand.made(2))
    book.name("b", stand.made(3))
    for one_more in (lambda: book.name("c", stand.made(4)), lambda: book.add_candidate(stand.made(4))):
        with pytest.raises(AmalgamError) as error:
            one_more()
        assert isinstance(error.value, ConflictError)
    book.name("c", book.current)
    book.pin(3)
    assert stand.states() == {1: "current named", 3: "pinned named", 2: "named"}


class ChangingEngine(CountingEngine):
    """Between two looks at its fallback something else happens, in another thread."""

    def __init__(self) -> None:
        self.between: list[Callable[[], object]] = []
        super().__init__()

    @property
    def fallback(self) -> WeightVersion | None:
        found = self.seen
        while self.between:
            thread = threading.Thread(target=self.between.pop(), daemon=True)
            thread.start()
            thread.join(1.0)  # longer it may not take: whoever looks may hold what it needs
        return found

    @fallback.setter
    def fallback(self, version: WeightVersion | None) -> None:  # type: ignore[override]
        self.seen = version


def test_a_fallback_that_comes_while_the_one_before_goes_stays() -> None:
    engine = ChangingEngine()
    stand = Stand(engine)
    book, first, second = stand.book, stand.book.current, stand.made(2)
    engine.fallback = first.version
    book.make_current(second)
    assert stand.states() == {2: "current", 1: "fallback"}

    def change() -> None:
        engine.fallback = second.version
        book.make_current(stand.made(3))

    engine.fallback = None  # version 2 has answered
    engine.between.append(change)
    assert engine.on_left is not None
    engine.on_left(2)
    assert stand.states() == {3: "current", 2: "fallback", 1: "draining"}
    book.close()


def test_a_change_stays_where_no_thread_can_be_started(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        stand.book.make_current(stand.made(2))
    assert stand.states() == {2: "current"} and stand.engine.kept == {2}
    assert not stand.freed.acquire(blocking=False)
    stand.book.make_current(stand.made(3))
    assert stand.freed.acquire(timeout=60)
