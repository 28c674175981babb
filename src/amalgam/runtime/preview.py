"""What versions hold, in what they differ, and what a change of the weights would take. Nothing is loaded.

In: versions, planned weights. Out: differences, bytes, seconds. Must never know: requests, HTTP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch

from amalgam.composition.devices import Devices
from amalgam.composition.loader import ModelLoader
from amalgam.composition.planned import PlannedWeight
from amalgam.config.placement import Rule
from amalgam.errors import OutOfMemoryError
from amalgam.models.weights import Origin, WeightVersion, fingerprint
from amalgam.runtime.changes import WeightChange


@dataclass(frozen=True)
class Contents:
    """What a version holds or would hold, by slot.

    Attributes:
        keys: equal ones stand for the same bytes.
        sizes: bytes in memory; of a version that is not built, as they are expected.
    """

    origins: Mapping[str, Origin]
    keys: Mapping[str, tuple[Any, ...]]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, version: WeightVersion) -> Self:
        return cls(version.origins, version.keys, {slot: version[slot].nbytes for slot in version.keys})

    @classmethod
    def planned(cls, planned: Iterable[PlannedWeight]) -> Self:
        weights = {weight.slot.name: weight for weight in planned}
        return cls(
            {slot: weight.origin for slot, weight in weights.items()},
            {slot: weight.key for slot, weight in weights.items()},
            {slot: weight.memory_bytes for slot, weight in weights.items()},
        )

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.origins, self.keys)

    @property
    def bytes_by_format(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for slot, origin in self.origins.items():
            found[origin.format] += self.sizes[slot]
        return dict(found)

    def bytes_by_device(self, primary: str) -> dict[str, int]:
        """
        Args:
            primary: name of the device that the model runs on; it comes first.
        """
        found = Counter({primary: 0})
        for slot, origin in self.origins.items():
            found[origin.device or primary] += self.sizes[slot]
        return dict(found)


def changed_weights(before: Contents, after: Contents) -> list[WeightChange]:
    """The weights of `after` that are not those of `before`."""
    return [
        WeightChange(
            after.origins[slot].name,
            before.origins[slot].source,
            after.origins[slot].source,
            before.origins[slot].format,
            after.origins[slot].format,
            before.sizes[slot],
            after.sizes[slot],
            before.origins[slot].device,
            after.origins[slot].device,
        )
        for slot in after.keys
        if after.keys[slot] != before.keys[slot]
    ]


@dataclass(frozen=True)
class Difference:
    """Two versions, and the weights in which they differ."""

    before: int
    after: int
    changed: Sequence[WeightChange]


@dataclass(frozen=True)
class Prepared:
    """What a version is to be made of.

    Attributes:
        shared: weights that are in memory already.
    """

    loader: ModelLoader
    rules: tuple[Rule, ...]
    planned: Sequence[PlannedWeight]
    shared: WeightVersion

    @property
    def missing(self) -> list[PlannedWeight]:
        """What has to be loaded."""
        return [weight for weight in self.planned if weight.slot.name not in self.shared.keys]


@dataclass(frozen=True)
class Load:
    """What loading some weights takes.

    Attributes:
        read_bytes: of their files.
        memory_bytes: that they have in memory, pages of the packed cache too.
        new_bytes: of memory that they would take; pages of the packed cache are none.
        peak_bytes: of memory that would be taken at most while they are loaded.
        new_by_device: new bytes by device; None: the one that the model runs on. `new_bytes` and `peak_bytes` are of
            its memory.
    """

    num_weights: int = 0
    read_bytes: int = 0
    memory_bytes: int = 0
    new_bytes: int = 0
    peak_bytes: int = 0
    new_by_device: Mapping[str | None, int] = field(default_factory=dict)

    @classmethod
    def of(cls, missing: Sequence[PlannedWeight], loader: ModelLoader, num_threads: int) -> Self:
        """
        Args:
            num_threads: that load at a time.
        """
        by_device = loader.new_bytes(missing)
        new_bytes = sum(nbytes for device, nbytes in by_device.items() if loader.devices.shares_memory(device))
        beside = sorted((_bytes_beside(weight) for weight in missing), reverse=True)[:num_threads]
        return cls(
            num_weights=len(missing),
            read_bytes=sum(weight.stored.nbytes for weight in missing),
            memory_bytes=sum(weight.memory_bytes for weight in missing),
            new_bytes=new_bytes,
            peak_bytes=new_bytes + sum(beside),
            new_by_device=by_device,
        )

    def check_room(self, available: int) -> None:
        """
        Args:
            available: bytes of memory that can be taken.

        Raises:
            OutOfMemoryError: there are too few.
        """
        if self.peak_bytes > available:
            raise OutOfMemoryError(
                f"The new weights take {self.peak_bytes} bytes of memory while they are loaded, and {available} are "
                "available.",
                remedy="Change fewer weights at a time, choose smaller formats, or let go of versions that are kept.",
            )


@dataclass(frozen=True)
class DevicePlan:
    """What a version would take of one device; see `DeviceRoom`.

    Attributes:
        bytes: of its weights there.
        new_bytes: of those that have to be brought there.
    """

    bytes: int
    new_bytes: int
    used_bytes: int
    limit_bytes: int | None
    available_bytes: int


@dataclass(frozen=True)
class ChangePlan:
    """A change of the weights as it would be made now.

    Attributes:
        rules: that would hold.
        version: that is in memory and would come back; None: one would be built.
        previous_version: the current one.
        changed: weights that differ from its own.
        load: of the weights that no version in memory has.
        shared_bytes: of those that are there already.
        available_bytes: of memory that can be taken.
        seconds: that it would take, as fast as weights were loaded the last time.
        devices: by name; empty: all is on one, without a limit.
    """

    rules: tuple[Rule, ...]
    version: int | None
    previous_version: int
    contents: Contents
    changed: Sequence[WeightChange]
    load: Load
    shared_bytes: int
    available_bytes: int
    seconds: float
    devices: Mapping[str, DevicePlan] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        return self.contents.fingerprint

    @property
    def has_room(self) -> bool:
        is_in_devices = all(device.new_bytes <= device.available_bytes for device in self.devices.values())
        return is_in_devices and self.load.peak_bytes <= self.available_bytes


def device_plans(contents: Contents, load: Load, devices: Devices) -> dict[str, DevicePlan]:
    """By device, where there are several or the only one has a limit."""
    sizes, primary = contents.bytes_by_device(devices.primary), devices.primary
    names = list(dict.fromkeys((*devices.names, *sizes)))
    if len(names) == 1 and not devices.has_limit(primary):
        return {}
    found = {}
    for name in names:
        other = None if name == primary else name
        room, new_bytes = devices.room(other), load.new_by_device.get(other, 0)
        found[name] = DevicePlan(sizes.get(name, 0), new_bytes, room.used_bytes, room.limit_bytes, room.available_bytes)
    return found


def _bytes_beside(weight: PlannedWeight) -> int:
    """What a thread takes beside the packed weight while it loads it: the stored one, and wide where it is changed."""
    is_changed = weight.quantize_to is not None or weight.is_expanded
    wide_bytes = torch.Size(weight.slot.shape).numel() * torch.float32.itemsize if is_changed else weight.nbytes
    return weight.stored.nbytes + wide_bytes
