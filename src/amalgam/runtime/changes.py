"""What a change of the weights did, and the latest attempts to make one.

In: two weight versions. Out: records. Must never know: how a version is built.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from amalgam.base.clock import Clock
from amalgam.errors import describe

if TYPE_CHECKING:
    from amalgam.models.weights import WeightVersion

MAX_REMAPS = 256  # that are remembered


@dataclass(frozen=True)
class WeightChange:
    """One weight whose origin differs between two versions."""

    name: str
    source_before: str
    source_after: str
    format_before: str
    format_after: str
    bytes_before: int
    bytes_after: int


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


def changed_weights(before: WeightVersion, after: WeightVersion) -> list[WeightChange]:
    """The weights of `after` that are not those of `before`."""
    return [
        WeightChange(
            after.origins[slot].name,
            before.origins[slot].source,
            after.origins[slot].source,
            before.origins[slot].format,
            after.origins[slot].format,
            before[slot].nbytes,
            after[slot].nbytes,
        )
        for slot in after.keys
        if after.keys[slot] != before.keys[slot]
    ]


class RemapLog:
    """The latest attempts, refused ones too. Any thread."""

    def __init__(self) -> None:
        self._records: deque[RemapRecord] = deque(maxlen=MAX_REMAPS)
        self._clock = Clock()

    def add(self, result: RemapResult) -> None:
        """A change went live."""
        self._records.append(
            RemapRecord(
                self._clock.now(),
                result.version,
                result.previous_version,
                len(result.changed),
                result.loaded_bytes,
                result.seconds,
            )
        )

    def add_failure(self, version_id: int, seconds: float, error: Exception) -> None:
        """Nothing has changed: `version_id` is in use still."""
        reason = describe(str(error), 400)
        self._records.append(RemapRecord(self._clock.now(), version_id, version_id, 0, 0, seconds, reason))

    def read(self) -> list[RemapRecord]:
        """Oldest first, at times of the wall clock as it is set now."""
        shift = self._clock.shift()
        return [replace(record, at=record.at + shift) for record in list(self._records)]
