"""The book of weight versions: which ones requests can run on, under which names, and when their memory goes back.

In: versions as they are built, names, pins. Out: the version that a request asks for, and what is told of each. Must
never know: how a version is built, HTTP.

    current     new requests run on it unless they ask for another
    pinned      kept until it is unpinned
    named       kept as long as it has a name that requests can ask for
    candidate   kept while it is tried
    fallback    kept until the current one has shown that it answers: if it fails before, this one is current again
    draining    nothing of these: only requests that have begun with it hold it

When nobody holds a draining version any more, neither a request nor who answers it, its weights are freed one by one in
a thread of its own, so that no step waits for that, and the memory goes back to the system.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from queue import SimpleQueue
from weakref import ref

from amalgam.base.heap import return_free_memory
from amalgam.base.threads import StoppableThread
from amalgam.config.names import ALLOWED_NAMES, CURRENT, MAX_KEPT, is_weights_name
from amalgam.config.placement import Rule
from amalgam.engine.core import Engine
from amalgam.engine.probation import FailedVersion
from amalgam.errors import ConflictError, RequestError, VersionNotFoundError, describe
from amalgam.models.weights import WeightVersion
from amalgam.runtime.served import ServedWeights

logger = logging.getLogger("amalgam.runtime")


class VersionState(StrEnum):
    CURRENT = CURRENT
    PINNED = "pinned"
    NAMED = "named"
    CANDIDATE = "candidate"
    FALLBACK = "fallback"
    DRAINING = "draining"


@dataclass(frozen=True)
class LiveVersion:
    """A version whose weights are in memory."""

    served: ServedWeights
    states: tuple[VersionState, ...]  # why it is kept; never empty
    names: tuple[str, ...]
    num_requests: int

    @property
    def version(self) -> WeightVersion:
        return self.served.version

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.served.rules

    @property
    def age_seconds(self) -> float:
        return max(0.0, time.time() - self.served.created_at)


class _Signal:
    """An event that can be set where an object dies, which may be inside any lock of this thread."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        self._queue.put(None)

    def wait(self) -> None:
        """Until it has been set since the last wait."""
        self._queue.get()
        while not self._queue.empty():
            self._queue.get()


class _Draining:
    """A version that requests in flight hold, and its weights, which outlive it so that they die where they may.

    Args:
        on_gone: called in any thread when nobody holds the version any more.
    """

    def __init__(self, served: ServedWeights, on_gone: Callable[[], None]) -> None:
        self.weights = list(served.version.weights)
        self._version = ref(served.version, lambda _: on_gone())
        self._loader, self._rules, self._created_at = served.loader, served.rules, served.created_at

    @property
    def served(self) -> ServedWeights | None:
        """None: it is gone."""
        version = self._version()
        return None if version is None else ServedWeights(self._loader, version, self._rules, self._created_at)


class VersionBook:
    """See above. Any thread."""

    def __init__(self, first: ServedWeights, engine: Engine, free: Callable[[], None] = return_free_memory) -> None:
        self._engine = engine
        self._free = free
        self._lock = threading.Lock()  # guards everything below
        self._freed = threading.Condition(self._lock)
        self._current = first
        self._next_id = first.version_id + 1
        self._used_ids = {first.version_id}
        self._pinned: dict[int, ServedWeights] = {}
        self._named: dict[str, ServedWeights] = {}
        self._candidates: dict[int, ServedWeights] = {}
        self._fallback: ServedWeights | None = None
        self._draining: dict[int, _Draining] = {}
        self._has_freed = False  # something else than a version
        self._num_freeing = 0  # versions that nobody holds, whose weights go
        self._num_freed = 0
        self._wake = _Signal()
        self._is_closed = False
        self._janitor: StoppableThread | None = None
        self.before_change: Callable[[], object] = lambda: None
        self.on_failed: Callable[[FailedVersion], None] = lambda failed: None
        self.on_kept: Callable[[], None] = lambda: None  # other versions have names, or are pinned
        engine.on_left = self._left
        engine.on_version_failed = self._version_failed

    @property
    def current(self) -> ServedWeights:
        """What new requests run on."""
        return self._current

    @property
    def num_freed(self) -> int:
        """How many versions' memory has gone back since the start."""
        with self._lock:
            return self._num_freed

    def wait_freed(self, num_freed: int, seconds: float) -> bool:
        """Wait until more versions than so many have been freed.

        Returns:
            Whether they have; False at once if no version drains.
        """
        with self._lock:
            self._freed.wait_for(lambda: self._num_freed > num_freed or not self.is_freeing, seconds)
            return self._num_freed > num_freed

    @property
    def is_freeing(self) -> bool:
        """Whether there are versions whose memory goes back when their last request has ended."""
        return bool(self._draining or self._num_freeing) and not self._is_closed

    def next_id(self) -> int:
        """An id that no version has had."""
        with self._lock:
            return self._take(self._next_id)

    @property
    def coming_id(self) -> int:
        """What `next_id` would give now."""
        return self._next_id

    def claim_id(self, version_id: int) -> int:
        """Take an id that somebody else has chosen, so that several servers call the same weights by one number.

        Raises:
            ConflictError: a version has had it.
        """
        with self._lock:
            if version_id in self._used_ids:
                raise ConflictError(
                    f"There has been a weight version {version_id} already.",
                    remedy=f"Free from here on: {self._next_id}.",
                )
            return self._take(version_id)

    def release_id(self, version_id: int) -> None:
        """No version has come to have it: it may be claimed again. `next_id` goes on all the same."""
        with self._lock:
            self._used_ids.discard(version_id)

    def _take(self, version_id: int) -> int:
        self._used_ids.add(version_id)
        self._next_id = max(self._next_id, version_id + 1)
        return version_id

    @property
    def kept(self) -> tuple[Mapping[str, int], tuple[int, ...]]:
        """What has names, and what is pinned, by ids."""
        with self._lock:
            return {name: served.version_id for name, served in self._named.items()}, tuple(self._pinned)

    def restore(self, served: ServedWeights, names: Iterable[str], *, is_pinned: bool) -> None:
        """Keep a version that was made before the first request, as a former process did or the settings say."""
        self._engine.prepare(served.version)
        with self._lock:
            self._take(served.version_id)
            self._named.update(dict.fromkeys(names, served))
            if is_pinned:
                self._pinned[served.version_id] = served
        self._settle()

    def make_current(self, served: ServedWeights) -> None:
        """Let new requests run on a version; the one before drains unless it is kept for another reason."""
        self._engine.prepare(served.version)
        self.before_change()
        with self._lock:
            known = self._alive()
            self._engine.set_version(served.version)  # under the lock: it may fail at once
            before, self._current = self._current, served
            fallback = self._engine.fallback
            former, self._fallback = self._fallback, None if fallback is None else known.get(fallback.version_id)
            if former is not None:
                self._let_go(former)
            self._draining.pop(served.version_id, None)
            self._next_id = max(self._next_id, served.version_id + 1)
            self._let_go(before)
        self._settle()

    def check_new(self, name: str) -> None:
        """To be called before a version is built for a name.

        Raises:
            RequestError: the name is not allowed.
            ConflictError: too many versions are kept.
        """
        check_name(name)
        with self._lock:
            if name not in self._named:
                self._check_room(1)

    def name(self, name: str, served: ServedWeights) -> None:
        """Give a version a name that requests can ask for; one that another version had passes to it.

        Raises:
            RequestError: the name is not allowed.
            ConflictError: too many versions are kept.
        """
        check_name(name)
        self._engine.prepare(served.version)
        with self._lock:
            self._check_room(served.version_id not in self._kept())
            before = self._named.get(name)
            self._named[name] = served
            self._draining.pop(served.version_id, None)
            if before is not None:
                self._let_go(before)
        self._settle()
        self.on_kept()

    def remove_name(self, name: str) -> ServedWeights:
        """Take a name away; its version drains unless it is kept for another reason.

        Raises:
            VersionNotFoundError: there is no such name.
        """
        with self._lock:
            served = self._named.pop(name, None)
            if served is None:
                raise self._unknown(name)
            self._let_go(served)
        self._settle()
        self.on_kept()
        return served

    def pin(self, version_id: int) -> ServedWeights:
        """Keep a version that is alive until it is unpinned. Harmless when repeated.

        Raises:
            VersionNotFoundError: it is not alive.
            ConflictError: too many versions are kept.
        """
        with self._lock:
            served = self._alive().get(version_id)
            if served is None:
                raise self._unknown(version_id)
            self._check_room(served.version_id not in self._kept())
            self._pinned[version_id] = served
            self._draining.pop(version_id, None)
        self._settle()
        self.on_kept()
        return served

    def unpin(self, version_id: int) -> ServedWeights:
        """Keep a version no longer, unless for another reason.

        Raises:
            VersionNotFoundError: it is not pinned.
        """
        with self._lock:
            served = self._pinned.pop(version_id, None)
            if served is None:
                raise VersionNotFoundError(
                    f"Weight version {version_id} is not pinned.",
                    remedy=f"Pinned: {', '.join(map(str, self._pinned)) or 'none'}.",
                )
            self._let_go(served)
        self._settle()
        self.on_kept()
        return served

    def add_candidate(self, served: ServedWeights) -> None:
        """Keep a version while it is tried.

        Raises:
            ConflictError: too many versions are kept.
        """
        self._engine.prepare(served.version)
        with self._lock:
            self._check_room(served.version_id not in self._kept())
            self._engine.watch(served.version)
            self._candidates[served.version_id] = served
            self._draining.pop(served.version_id, None)
        self._settle()

    def remove_candidate(self, version_id: int) -> None:
        """A version is tried no more. Harmless when repeated."""
        with self._lock:
            served = self._candidates.pop(version_id, None)
            if served is not None:
                self._engine.unwatch(served.version)
                self._let_go(served)
        self._settle()

    def find(self, weights: str | int, param: str | None = "weights") -> ServedWeights:
        """The version that a request asks for, by a name or an id.

        Args:
            param: the field that asks for it.

        Raises:
            VersionNotFoundError: there is none, or it only drains.
        """
        with self._lock:
            if weights == CURRENT:
                return self._current
            if isinstance(weights, str) and weights in self._named:
                return self._named[weights]
            version_id = as_id(weights)
            found = None if version_id is None else self._kept().get(version_id)
            if found is None:
                raise self._unknown(weights, param)
            return found

    def alive(self, version_id: int) -> ServedWeights | None:
        """A version whose weights are in memory, draining ones too."""
        with self._lock:
            return self._alive().get(version_id)

    def live(self) -> list[LiveVersion]:
        """Every version whose weights are in memory: the current one first, then the newest."""
        num_requests = self._engine.status().versions
        with self._lock:
            return [
                LiveVersion(served, self._states(version_id), self._names(version_id), num_requests.get(version_id, 0))
                for version_id, served in sorted(
                    self._alive().items(), key=lambda item: (item[0] != self._current.version_id, -item[0])
                )
            ]

    @property
    def versions(self) -> list[WeightVersion]:
        """All that are in memory, the current one first."""
        with self._lock:
            return [served.version for served in self._alive().values()]

    def has_freed(self) -> None:
        """Something else has let go of weights, whose memory is to go back to the system as well."""
        with self._lock:
            self._has_freed = True
        self._settle()

    def close(self) -> None:
        """End the thread that frees."""
        with self._lock:
            self._is_closed = True
            self._freed.notify_all()
        self._engine.on_left = None
        self._wake.set()

    def _kept(self) -> dict[int, ServedWeights]:
        kept = [self._current, *self._pinned.values(), *self._named.values(), *self._candidates.values()]
        kept += [] if self._fallback is None else [self._fallback]
        return {served.version_id: served for served in kept}

    def _alive(self) -> dict[int, ServedWeights]:
        draining = {version_id: one.served for version_id, one in self._draining.items()}
        return self._kept() | {version_id: served for version_id, served in draining.items() if served is not None}

    def _states(self, version_id: int) -> tuple[VersionState, ...]:
        found = [
            state
            for state, holds in (
                (VersionState.CURRENT, version_id == self._current.version_id),
                (VersionState.PINNED, version_id in self._pinned),
                (VersionState.NAMED, bool(self._names(version_id))),
                (VersionState.CANDIDATE, version_id in self._candidates),
                (VersionState.FALLBACK, self._fallback is not None and version_id == self._fallback.version_id),
            )
            if holds
        ]
        return tuple(found) or (VersionState.DRAINING,)

    def _names(self, version_id: int) -> tuple[str, ...]:
        return tuple(name for name, served in self._named.items() if served.version_id == version_id)

    def _check_room(self, num_more: int) -> None:
        if len(self._kept()) + num_more > MAX_KEPT + 1:
            raise ConflictError(
                f"{MAX_KEPT} weight versions are kept beside the current one.", remedy="Unpin one, or remove a name."
            )

    def _let_go(self, served: ServedWeights) -> None:
        if served.version_id not in self._kept():
            self._draining[served.version_id] = _Draining(served, self._wake.set)

    def _unknown(self, weights: str | int, param: str | None = None) -> VersionNotFoundError:
        known = [CURRENT, *self._named, *map(str, self._kept())]
        if as_id(weights) in self._draining:
            what = f"Weight version {weights} takes no new requests."
        else:
            what = f"There are no weights {describe(weights)}."
        return VersionNotFoundError(what, remedy=f"Known: {', '.join(known)}.", param=param)

    def _settle(self) -> None:
        """The engine hears what is kept, and what nobody needs any more is freed."""
        with self._lock:
            needs_janitor = bool(self._draining) or self._has_freed
            if needs_janitor and self._janitor is None and not self._is_closed:
                self._janitor = self._started_janitor()
            # The current one too: it may be kept when another one takes its place.
            self._engine.keep(self._kept().keys())
        self._wake.set()

    def _started_janitor(self) -> StoppableThread | None:
        janitor = StoppableThread(self._clean_up, "amalgam-versions", self.close)
        try:
            janitor.start()
        except RuntimeError as error:  # no more threads: what has changed stays so, and the next change tries again
            # As a text: the error's frames hold versions, as long as somebody keeps the record.
            logger.error("the memory of weight versions that are gone stays taken: %s", str(error))
            return None
        return janitor

    def _left(self, version_id: int) -> None:
        if self._fallback is not None and self._engine.fallback is None:  # the current version has answered
            with self._lock:
                # Another look: until the lock was free, a change may have set another fallback.
                if self._fallback is not None and self._engine.fallback is None:
                    fallback, self._fallback = self._fallback, None
                    self._let_go(fallback)
            self._settle()
        if version_id in self._draining:
            self._wake.set()

    def _version_failed(self, failed: FailedVersion) -> None:
        """The engine no longer uses a version: make the one before current again and drop it as a candidate.

        Its pins and names stay.
        """
        version_id = failed.version.version_id
        with self._lock:
            if version_id == self._current.version_id and (instead := self._alive().get(failed.instead.version_id)):
                self._fallback, before, self._current = None, self._current, instead
                self._draining.pop(instead.version_id, None)
                self._let_go(before)
            candidate = self._candidates.pop(version_id, None)
            if candidate is not None:
                self._let_go(candidate)
        self._settle()
        self.on_failed(failed)

    def _clean_up(self) -> None:
        while True:
            self._wake.wait()
            if self._is_closed:
                return
            self._free_drained()

    def _free_drained(self) -> None:
        with self._lock:
            gone = [version_id for version_id, one in self._draining.items() if one.served is None]
            weights = [weight for version_id in gone for weight in self._draining.pop(version_id).weights]
            has_freed, self._has_freed = self._has_freed, False
            self._num_freeing = len(gone)
        if not gone and not has_freed:
            return
        try:
            while weights:
                weights.pop()
                time.sleep(0)  # a step that waits for the interpreter's lock gets it
            self._free()
        finally:
            with self._lock:
                self._num_freeing, self._num_freed = 0, self._num_freed + len(gone)
                self._freed.notify_all()


def as_id(weights: str | int) -> int | None:
    """The version id that a request asks for; None: it asks for a name."""
    text = str(weights)
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def check_name(name: str) -> None:
    """
    Raises:
        RequestError: a version cannot be called so.
    """
    if not is_weights_name(name):
        raise RequestError(
            f"Weights cannot be called {describe(name)}.", remedy=f"Allowed: {ALLOWED_NAMES}.", param="name"
        )
