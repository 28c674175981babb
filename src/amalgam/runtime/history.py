"""The file of what has changed the weights, which a restart goes on from.

In: records. Out: the file, and the records and rules of former processes. Must never know: how a version is built,
tensors.

One JSON object in a line. A line is on the disk before its change is answered; what a killed process has left half
written is passed over. A change has a line when it begins, which says that its process has ended, and one when it ends,
which takes the place of that. Of rules a line has what differs from those of a version before: `since` which one, the
places `dropped`, the rules `added` behind the rest. The file is locked as long as it is in use: the numbers of versions
go on from its last one, and two processes would give the same ones.

Between the records stand lines that name a sound version: it has answered, or its process has ended in order. A version
that kills its process has no such line, and is not begun with again and again. Other lines name the versions that are
kept beside the current one: the last of them holds.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from amalgam.base.files import replace_file
from amalgam.base.locks import FileLock
from amalgam.base.strict_json import parse_json
from amalgam.config.names import WeightsName
from amalgam.config.placement import Rule
from amalgam.errors import ConfigError, ConflictError
from amalgam.runtime.changes import MAX_REMAPS, RemapRecord

logger = logging.getLogger("amalgam.runtime")

MAX_VERSION_ID = 10**18 - 1  # that requests can ask for
_MAX_STARTS = 3  # with rules under which no version has turned out sound

_RECORD = TypeAdapter(RemapRecord)
_RULES = TypeAdapter(tuple[Rule, ...])
_VERSION_ID = TypeAdapter(int)
_SOUND = "sound"  # the only key of a line that names a sound version
_KEPT = "kept"  # the only key of a line that names the versions that are kept
_BEGINNINGS = tuple(f'{{"{key}": '.encode() for key in ("at", _SOUND, _KEPT))  # of all lines
_KeptId = Annotated[int, Field(ge=1, le=MAX_VERSION_ID)]


@dataclass(frozen=True)
class Kept:
    """The versions that are kept beside the current one, because somebody wants that.

    Attributes:
        named: name → id.
    """

    named: Mapping[WeightsName, _KeptId] = field(default_factory=dict)
    pinned: tuple[_KeptId, ...] = ()

    @property
    def version_ids(self) -> list[int]:
        return sorted({*self.named.values(), *self.pinned})


_KEPT_VERSIONS = TypeAdapter(Kept)


class HistoryFile:
    """A history that is open.

    Attributes:
        records: of former processes, the oldest first; the latest 256, and those of versions that were kept.
        kept: by the process before, at its end.

    Raises:
        ConfigError: the file cannot be read, or is none of ours.
        ConflictError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser().absolute()
        self._lock = FileLock(self._path)
        self._writing = threading.Lock()
        self._sound_ids: set[int] = set()
        self.kept = Kept()
        self._written: tuple[int, tuple[Rule, ...]] | None = None  # the last version in the file, and its rules
        self._is_torn = False  # the last line may be half written
        self._is_closed = False
        try:
            if not self._lock.try_acquire():
                raise ConflictError(
                    f"weights.history {str(path)!r} is in use by {self._lock.holder}.",
                    remedy="Give each process a file of its own.",
                )
            try:
                self.records: Sequence[RemapRecord] = self._latest(self._read())
                self._rewrite()
            except BaseException:
                self._lock.release()
                raise
        except OSError as error:
            raise ConfigError(
                f"weights.history {str(path)!r} cannot be used: {error}.",
                remedy="Name a file in a folder that this process may write to.",
            ) from None

    @property
    def last_version_id(self) -> int:
        """The highest number that a version has had; 0: there was none."""
        return max((*self.kept.version_ids, *(record.version for record in self.records)), default=0)

    @property
    def last_rules(self) -> tuple[Rule, ...] | None:
        """Of the last version that new requests started on; None: there was none.

        Processes may have begun with it several times, and each may have been killed before it gave one answer: then
        those of the last sound version.
        """
        live, untold = self._lives()
        if not live:
            return None
        num_starts = _num_starts(untold)
        if num_starts < _MAX_STARTS:
            return live[0].rules
        logger.warning(
            "weights.resume: %d processes have begun with the rules of version %d, and none has given an answer: "
            "those of the last version that has hold again",
            num_starts,
            live[0].version,
        )
        return live[len(untold)].rules if len(untold) < len(live) else None

    @property
    def last_kept(self) -> Kept:
        """What was kept beside that version; nothing if processes have been killed with them again and again."""
        return self.kept if _num_starts(self._lives()[1]) < _MAX_STARTS else Kept()

    def _lives(self) -> tuple[list[RemapRecord], list[RemapRecord]]:
        """What new requests have started on, the latest first; and those of them behind the last sound version."""
        # A refused change has no rules; one whose version failed has those of the version that was gone back to.
        live = [record for record in reversed(self.records) if record.rules is not None and record.name is None]
        return live, list(itertools.takewhile(lambda record: record.version not in self._sound_ids, live))

    def add(self, record: RemapRecord) -> None:
        """Write a record behind the others. A file that cannot be written is logged: the weights matter more."""
        with self._writing:
            if not self._append(lambda: self._line(record)):
                self._written = None

    def is_sound(self, version_id: int) -> bool:
        """Whether a version has answered, or its process has ended in order. Any thread."""
        return version_id in self._sound_ids

    def note_sound(self, version_id: int) -> None:
        """A version has answered, or its process ends in order. Written once. Any thread."""
        with self._writing:
            if version_id not in self._sound_ids:
                self._sound_ids.add(version_id)
                self._append(lambda: _sound_line(version_id))

    def note_kept(self, read: Callable[[], Kept]) -> None:
        """Other versions are kept than before. Any thread.

        Args:
            read: which ones; called when it is this thread's turn, so that the last line is the latest.
        """
        with self._writing:
            kept = read()
            self._append(lambda: _kept_line(kept))

    def _append(self, make: Callable[[], bytes]) -> bool:
        if self._is_closed:  # somebody else may have it by now
            return True
        line = (b"\n" if self._is_torn else b"") + make()
        self._is_torn = True
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            logger.error("weights.history %s cannot be written; a restart will not know of this: %s", self._path, error)
            return False
        self._is_torn = False
        return True

    def close(self) -> None:
        """Let others have the file. Harmless when repeated."""
        self._is_closed = True
        self._lock.release()

    def _line(self, record: RemapRecord) -> bytes:
        data = _RECORD.dump_python(replace(record, rules=None), mode="json")
        if record.rules is not None:
            since, before = self._written or (0, ())
            dropped, added = _difference(before, record.rules)
            del data["rules"]
            data |= {"since": since, "dropped": dropped, "added": [rule.model_dump() for rule in added]}
            self._written = record.version, record.rules
        return json.dumps(data, ensure_ascii=False).encode() + b"\n"

    def _read(self) -> list[RemapRecord]:
        if not self._path.exists():
            return []
        records: dict[str | int, RemapRecord] = {}  # by the ids of changes
        is_ours = is_foreign = False
        known: tuple[int, tuple[Rule, ...]] | None = 0, ()
        lines = self._path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                data = parse_json(line)
                if data.keys() == {_SOUND}:
                    self._sound_ids.add(_VERSION_ID.validate_python(data[_SOUND]))
                    is_ours = True
                    continue
                if data.keys() == {_KEPT}:
                    self.kept = _KEPT_VERSIONS.validate_python(data[_KEPT])
                    is_ours = True
                    continue
                if "since" in data:
                    rules = _rules_of(data, known)
                    data["rules"], known = rules, None if rules is None else (data["version"], rules)
                record = _RECORD.validate_python(data)
                if not math.isfinite(record.at + record.seconds) or record.version > MAX_VERSION_ID:
                    raise ValueError("no time, or no number of a version")
                key = number if record.asked is None else record.asked.id
                records.pop(key, None)  # that it had begun
                records[key] = record
                is_ours = True
            except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
                logger.warning("weights.history %s: line %d is no record and is passed over", self._path, number)
                is_foreign = is_foreign or not _is_begun(line)
        if is_foreign and not is_ours:
            raise ConfigError(
                f"weights.history {str(self._path)!r} holds no record of a change.", remedy="Name another file."
            )
        return list(records.values())

    def _latest(self, records: Sequence[RemapRecord]) -> list[RemapRecord]:
        """What is to be remembered: the latest records, and the rules of versions that were kept."""
        older, latest = records[:-MAX_REMAPS], records[-MAX_REMAPS:]
        wanted = set(self.kept.version_ids)
        kept = {record.version: record for record in older if record.version in wanted and record.rules is not None}
        return [*kept.values(), *latest]

    def _rewrite(self) -> None:
        """The records that are kept, each line whole, and which of their versions are sound and kept."""
        self._sound_ids &= {record.version for record in self.records}
        lines = [*map(self._line, self.records), *map(_sound_line, sorted(self._sound_ids))]
        if self.kept.version_ids:
            lines.append(_kept_line(self.kept))
        replace_file(self._path, b"".join(lines))


def _is_begun(line: bytes) -> bool:
    """Whether a line that is no record may be the beginning of one, which a killed process has left."""
    try:
        parse_json(line)
    except (ValueError, RecursionError):
        return any(line.startswith(beginning) or beginning.startswith(line) for beginning in _BEGINNINGS)
    return False


def _num_starts(untold: Sequence[RemapRecord]) -> int:
    """How many processes have begun with the rules of the first of these."""
    return sum(record.is_start and record.rules == untold[0].rules for record in untold)


def _sound_line(version_id: int) -> bytes:
    return json.dumps({_SOUND: version_id}).encode() + b"\n"


def _kept_line(kept: Kept) -> bytes:
    return json.dumps({_KEPT: asdict(kept)}, ensure_ascii=False).encode() + b"\n"


def _difference(before: Sequence[Rule], after: Sequence[Rule]) -> tuple[list[int], Sequence[Rule]]:
    """Which rules of `before` to leave out, and which to put behind the rest, to get `after`."""
    num_kept, dropped = 0, []
    for place, rule in enumerate(before):
        if num_kept < len(after) and (after[num_kept] is rule or after[num_kept] == rule):
            num_kept += 1
        else:
            dropped.append(place)
    return dropped, after[num_kept:]


def _rules_of(data: dict[str, Any], known: tuple[int, tuple[Rule, ...]] | None) -> tuple[Rule, ...] | None:
    """The rules of a line, whose fields for them are taken out.

    Args:
        known: the last version whose rules are known, and they.

    Returns:
        None: they differ from those of a version that is not there.
    """
    since, dropped, added = data.pop("since"), set(data.pop("dropped")), _RULES.validate_python(data.pop("added"))
    if since == 0:
        return added
    if known is None or since != known[0]:
        return None
    return (*(rule for place, rule in enumerate(known[1]) if place not in dropped), *added)
