"""What a change of the weights asks for, what it did, and the latest attempts to make one.

In: mappings and rules. Out: rules, records. Must never know: how a version is built, tensors.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace

from amalgam.base.clock import Clock
from amalgam.base.counting import counted
from amalgam.config.placement import Placement, PlacementLike, Rule, build_rules
from amalgam.errors import CancelledError, ConflictError, PlanError, RequestError, UnavailableError, describe

MAX_REMAPS = 256  # that are remembered
MAX_UNDOS = 64  # changes that can be taken back, one after the other
MAX_REASON_CHARS = 400
MAX_RULES = 2**18  # that are remembered, of all of them; those of the latest


@dataclass(frozen=True)
class ChangeRequest:
    """What a change of the weights asks for: a mapping, a whole set of rules, the files as they are now, or a version.

    Attributes:
        mapping: pattern → source or placement: rules that are added to the current ones, or replace those of the same
            patterns; None removes the rule.
        rules: all that hold from now on.
        is_reload: the current rules, of the files as they are now.
        version: to go back to, by name or id: itself if it is still in memory, otherwise what its rules give now.
        name: what the version is called; None: new requests start on it.
        version_id: that a version which is built gets, so that several servers call the same weights by one number;
            None: the next.

    Raises:
        RequestError: not exactly one of the four is asked for.
    """

    mapping: Mapping[str, PlacementLike | None] | None = None
    rules: tuple[Rule, ...] | None = None
    is_reload: bool = False
    version: str | int | None = None
    name: str | None = None
    version_id: int | None = None

    def __post_init__(self) -> None:
        given = {
            "weight_mapping": self.mapping is not None,
            "rules": self.rules is not None,
            "reload": self.is_reload,
            "version": self.version is not None,
        }
        if sum(given.values()) != 1:
            found = " and ".join(name for name, is_given in given.items() if is_given) or "none"
            raise RequestError(f"Of {', '.join(given)} there is {found}.", remedy="Give exactly one of them.")

    @property
    def kind(self) -> str:
        """What is asked for, in a word."""
        if self.mapping is not None:
            return "mapping"
        if self.rules is not None:
            return "rules"
        return "reload" if self.is_reload else "version"

    @property
    def what(self) -> str:
        """The same in a few words."""
        if self.mapping is not None:
            told = counted(len(self.mapping), "rule")
        elif self.rules is not None:
            told = f"the whole set of {counted(len(self.rules), 'rule')}"
        else:
            told = "the files as they are now" if self.is_reload else f"back to version {self.version}"
        return told if self.name is None else f"{told}, called {self.name}"

    def rules_after(self, rules: Iterable[Rule]) -> tuple[Rule, ...]:
        """The rules that it makes of those that hold now; a change to a version keeps them.

        Raises:
            PlanError: the mapping is empty, or there is no rule to remove.
        """
        if self.rules is not None:
            return self.rules
        rules = tuple(rules)
        return rules if self.mapping is None else merged(rules, self.mapping)


def merged(rules: tuple[Rule, ...], mapping: Mapping[str, PlacementLike | None]) -> tuple[Rule, ...]:
    """Rules with those of a mapping behind them, in place of those of the same patterns; None removes.

    Of a source and a device, what a new rule does not say stays as the old one says it.

    Raises:
        PlanError: the mapping is empty, or there is no rule to remove.
    """
    if not mapping:
        raise PlanError("weight_mapping is empty.", remedy="Give at least one name or pattern and its source.")
    known: dict[str, Placement] = {}
    for rule in rules:
        if rule.pattern in mapping:
            known[rule.pattern] = rule.over(known.get(rule.pattern))
    for pattern, value in mapping.items():
        if value is None and pattern not in known:
            raise PlanError(f"There is no rule {describe(pattern)} to remove.", remedy="GET /weights tells the rules.")
    added = build_rules({pattern: value for pattern, value in mapping.items() if value is not None})
    whole = build_rules({rule.pattern: rule.over(known.get(rule.pattern)) for rule in added})
    return (*(rule for rule in rules if rule.pattern not in mapping), *whole)


def check_rollback(earlier: Sized) -> None:
    """
    Args:
        earlier: versions that were in use.

    Raises:
        ConflictError: there are none.
    """
    if not earlier:
        raise ConflictError("There is no earlier version to go back to.", remedy="Name one that is kept.")


def check_undo(version_id: int, current_id: int, earlier: Sized) -> None:
    """
    Args:
        version_id: the version to be taken back.
        current_id: the one in use.
        earlier: what was in use before.

    Raises:
        ConflictError: another version is in use, or there is nothing to go back to.
    """
    check_in_use(version_id, current_id, "Look at what has changed since, then undo that version.")
    if not earlier:
        raise ConflictError(
            "No change of the weight mapping is left to undo.",
            remedy=f"The last {MAX_UNDOS} changes can be taken back, one after the other.",
        )


def check_in_use(version_id: int, current_id: int, remedy: str) -> None:
    """
    Raises:
        ConflictError: another version is in use meanwhile.
    """
    if version_id != current_id:
        raise ConflictError(f"Weight version {version_id} is not in use any more: {current_id} is.", remedy=remedy)


def reason_of(error: BaseException) -> str:
    """Why a change has failed, for people; never longer than a line of a table bears."""
    text = str(error) or type(error).__name__
    return text if len(text) <= MAX_REASON_CHARS else f"{text[:MAX_REASON_CHARS]}…"


def code_of(error: BaseException) -> str:
    """What kind of error it is, as answers over HTTP have it."""
    return str(getattr(error, "code", "internal_error"))


@dataclass(frozen=True)
class WeightChange:
    """One weight whose origin, or whose device, differs between two versions.

    Attributes:
        device_before, device_after: None: with the rest of the model.
    """

    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int
    device_before: str | None = None
    device_after: str | None = None


@dataclass(frozen=True)
class RemapResult:
    """A new weight version went live. `changed` is empty if it holds exactly the same bytes as the one before."""

    version: int
    previous_version: int
    fingerprint: str
    changed: list[WeightChange]
    num_loaded: int
    loaded_bytes: int
    shared_bytes: int
    seconds: float
    name: str | None = None  # that the version has been given; None: new requests start on it


@dataclass(frozen=True)
class Asked:
    """What was asked for, and the id by which it is asked after.

    Attributes:
        kind: `mapping`, `rules`, `reload`, `undo`, …
        what: the same in a few words.
    """

    kind: str
    what: str
    id: str = field(default_factory=lambda: secrets.token_hex(6))


@dataclass(frozen=True)
class RemapRecord:
    """One attempt to change the weights."""

    at: float  # when it ended, Unix seconds
    version: int  # in use afterwards
    previous_version: int
    num_changed: int
    loaded_bytes: int
    seconds: float
    error: str | None = None  # why it changed nothing
    name: str | None = None  # that the version was given; None: new requests started on it
    fingerprint: str = ""  # of the version
    rules: tuple[Rule, ...] | None = None  # of the version; None: nothing has changed
    is_start: bool = False  # of a process, which began with that version
    is_cancelled: bool = False  # somebody has ended it
    error_type: str | None = None  # as answers over HTTP have it
    asked: Asked | None = None  # None: a start, or written before this was kept


class RemapLog:
    """The latest attempts, refused ones too. Any thread.

    Args:
        earlier: of former processes, the oldest first.
        write: takes each record.
    """

    def __init__(
        self, earlier: Sequence[RemapRecord] = (), write: Callable[[RemapRecord], None] = lambda record: None
    ) -> None:
        self._earlier = tuple(earlier)
        self._write = write
        self._records: deque[RemapRecord] = deque(maxlen=MAX_REMAPS)
        self._clock = Clock()
        self._lock = threading.Lock()  # the file has each record as it differs from the one before

    def start(self, record: RemapRecord) -> None:
        """The process has begun."""
        self._add(replace(record, at=self._clock.now(), is_start=True))

    def begin(self, version_id: int, asked: Asked) -> None:
        """A change has begun. What is written of it holds if its process does not get to write how it ended."""
        with self._lock:
            self._write(
                RemapRecord(
                    self._clock.now(),
                    version_id,
                    version_id,
                    0,
                    0,
                    0.0,
                    "The process ended before the change did.",
                    error_type=UnavailableError.code,
                    asked=asked,
                )
            )

    def add(self, result: RemapResult, rules: tuple[Rule, ...], asked: Asked) -> None:
        """A change went live.

        Args:
            rules: of the version.
        """
        self._add(
            RemapRecord(
                self._clock.now(),
                result.version,
                result.previous_version,
                len(result.changed),
                result.loaded_bytes,
                result.seconds,
                name=result.name,
                fingerprint=result.fingerprint,
                rules=rules,
                asked=asked,
            )
        )

    def add_failure(self, version_id: int, seconds: float, error: Exception, asked: Asked) -> None:
        """Nothing has changed: `version_id` is in use still."""
        self._add(
            RemapRecord(
                self._clock.now(),
                version_id,
                version_id,
                0,
                0,
                seconds,
                reason_of(error),
                is_cancelled=isinstance(error, CancelledError),
                error_type=code_of(error),
                asked=asked,
            )
        )

    def add_failed_version(self, version_id: int, rules: tuple[Rule, ...], failed_id: int, reason: str) -> RemapRecord:
        """`failed_id` could not answer, and `version_id` with these rules is in use in its place."""
        asked = Asked("failed_version", f"version {failed_id} could not answer")
        record = RemapRecord(self._clock.now(), version_id, failed_id, 0, 0, 0.0, reason, rules=rules, asked=asked)
        self._add(record)
        return record

    def rules_of(self, version_id: int) -> tuple[Rule, ...] | None:
        """Of a version that there has been; None: nobody knows."""
        return next(
            (r.rules for r in reversed(self.history()) if r.rules is not None and r.version == version_id), None
        )

    def earlier_versions(self, rules: tuple[Rule, ...]) -> list[int]:
        """Those of former processes that new requests started on, up to the last one with other rules than these."""
        found: list[tuple[int, tuple[Rule, ...]]] = []
        for record in self._earlier:
            if record.rules is not None and record.name is None and (not found or found[-1][1] != record.rules):
                found.append((record.version, record.rules))
        while found and found[-1][1] == rules:
            found.pop()
        return [version_id for version_id, _ in found]

    def _add(self, record: RemapRecord) -> None:
        with self._lock:
            self._records.append(record)
            self._write(record)
            self._forget_rules()

    def _forget_rules(self) -> None:
        """Of the oldest, where all together are too many: there may be one for each of a hundred thousand weights."""
        room, kept = MAX_RULES, set[int]()
        for place in reversed(range(len(self._records))):
            rules = self._records[place].rules
            if rules is None or id(rules) in kept:
                continue
            room -= len(rules)
            if room < 0 and kept:
                self._records[place] = replace(self._records[place], rules=None)
            else:
                kept.add(id(rules))
        if room < 0:
            self._earlier = tuple(replace(record, rules=None) for record in self._earlier)

    def history(self) -> list[RemapRecord]:
        """Those of former processes too, and what each process began with; the oldest first."""
        return [*self._earlier, *self._current()]

    def read(self) -> list[RemapRecord]:
        """Of this process. Oldest first, at times of the wall clock as it is set now."""
        return [record for record in self._current() if not record.is_start]

    def _current(self) -> list[RemapRecord]:
        shift = self._clock.shift()
        return [replace(record, at=record.at + shift) for record in list(self._records)]
