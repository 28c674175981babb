"""The file of what has changed the weights, which a restart goes on from.

In: records. Out: the file, and the records and rules of former processes. Must never know: how a version is built,
tensors.

One JSON object in a line. A line is on the disk before its change is answered; what a killed process has left half
written is passed over. Of rules a line has what differs from those of a version before: `since` which one, the places
`dropped`, the rules `added` behind the rest. The file is locked as long as it is in use: the numbers of versions go on
from its last one, and two processes would give the same ones.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from amalgam.base.files import replace_file
from amalgam.base.locks import FileLock
from amalgam.config.settings import Rule
from amalgam.errors import ConfigError, ConflictError
from amalgam.runtime.changes import MAX_REMAPS, RemapRecord

logger = logging.getLogger("amalgam.runtime")

MAX_VERSION_ID = 10**18 - 1  # that requests can ask for

_RECORD = TypeAdapter(RemapRecord)
_RULES = TypeAdapter(tuple[Rule, ...])


class HistoryFile:
    """A history that is open.

    Attributes:
        records: of former processes, the oldest first; the latest 256.

    Raises:
        ConfigError: the file cannot be read, or is none of ours.
        ConflictError: another process has it open.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.expanduser().absolute()
        self._lock = FileLock(self._path)
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
                self.records: Sequence[RemapRecord] = self._read()[-MAX_REMAPS:]
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
        return max((record.version for record in self.records), default=0)

    @property
    def last_rules(self) -> tuple[Rule, ...] | None:
        """Of the last version that new requests started on; None: there was none."""
        # A refused change has no rules; one whose version failed has those of the version that was gone back to.
        live = (record.rules for record in reversed(self.records) if record.rules is not None and record.name is None)
        return next(live, None)

    def add(self, record: RemapRecord) -> None:
        """Write a record behind the others. A file that cannot be written is logged: the weights matter more."""
        if self._is_closed:  # somebody else may have it by now
            return
        line = (b"\n" if self._is_torn else b"") + self._line(record)
        self._is_torn = True
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            logger.error("weights.history %s cannot be written; a restart will not know of this: %s", self._path, error)
            self._written = None
            return
        self._is_torn = False

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
        records: list[RemapRecord] = []
        known: tuple[int, tuple[Rule, ...]] | None = 0, ()
        lines = self._path.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
                if "since" in data:
                    rules = _rules_of(data, known)
                    data["rules"], known = rules, None if rules is None else (data["version"], rules)
                record = _RECORD.validate_python(data)
                if not math.isfinite(record.at + record.seconds) or record.version > MAX_VERSION_ID:
                    raise ValueError("no time, or no number of a version")
                records.append(record)
            except (ValueError, TypeError, LookupError, RecursionError):
                logger.warning("weights.history %s: line %d is no record and is passed over", self._path, number)
        if lines and not records:
            raise ConfigError(
                f"weights.history {str(self._path)!r} holds no record of a change.", remedy="Name another file."
            )
        return records

    def _rewrite(self) -> None:
        """The records that are kept, each line whole."""
        replace_file(self._path, b"".join(map(self._line, self.records)))


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
