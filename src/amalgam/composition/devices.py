"""Where weights may lie beside the rest of the model, and how much room there is.

In: settings, planned weights, packed weights. Out: each device's backend and its bytes, or the error: one that is not
there, that may not have a weight, or that is too small. Must never know: rules, requests.
"""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from amalgam.composition.planned import PlannedWeight
from amalgam.composition.rules import Choice, Choices
from amalgam.config.devices import device_name, is_stand_in, size_in_bytes
from amalgam.config.inference import InferenceSettings
from amalgam.errors import ConfigError, OutOfMemoryError, PlanError
from amalgam.kernels.backends import Backend, choose_backend
from amalgam.kernels.devices import free_bytes, name_of, torch_device
from amalgam.kernels.weights import PackedWeight
from amalgam.models.spec import Slot

_EXPERT = re.compile(r"(layers\.\d+\.mlp\.experts\.\d+)\.")


@dataclass(frozen=True)
class DeviceRoom:
    """How much a device has for weights.

    Attributes:
        limit_bytes: of `inference.devices`; None: no limit but its memory.
        used_bytes: by weights that are there, of all versions and drafts.
        available_bytes: for more.
    """

    limit_bytes: int | None
    used_bytes: int
    available_bytes: int


class Devices:
    """The devices of one model. Any thread.

    Attributes:
        primary: name of the one that the model runs on.
    """

    def __init__(self, inference: InferenceSettings, device: torch.device) -> None:
        """
        Args:
            device: that the model runs on.
        """
        declared = inference.device_map
        self.primary = name_of(device) if declared == "auto" else device_name(declared)
        self._limits = {name: size_in_bytes(size) if size else None for name, size in inference.devices.items()}
        self._dtype: torch.dtype = getattr(torch, inference.dtype)
        self._backends: dict[str | None, Backend] = {None: choose_backend(self._dtype, device)}
        self._device = device
        self._weights: dict[str | None, WeakKeyDictionary[PackedWeight, int]] = defaultdict(WeakKeyDictionary)
        self._uploaded: Counter[str] = Counter()
        self._lock = threading.Lock()

    def backend(self, device: str | None) -> Backend:
        """Who prepares weights for a device; None: the primary one."""
        with self._lock:
            if device not in self._backends:
                assert device is not None
                self._backends[device] = choose_backend(self._dtype, torch_device(device))
            return self._backends[device]

    def other(self, choice: Choice) -> str | None:
        """The device of a weight, None if it lies with the rest of the model.

        Raises:
            PlanError: a stand-in for a card that nobody has declared.
        """
        name = choice.device
        if name is None or name == self.primary:
            return None
        if is_stand_in(name) and name not in self._limits:
            assert choice.device_rule is not None
            raise PlanError(
                f"Rule {choice.device_rule.pattern!r} names device {name!r}, which is not declared.",
                remedy=f"Devices: {', '.join(self.names)}. A stand-in for a card is declared in inference.devices.",
            )
        return name

    @property
    def names(self) -> list[str]:
        """Declared ones, the primary first."""
        return list(dict.fromkeys((self.primary, *self._limits)))

    def placement(self, slots: Mapping[str, Slot], choices: Choices) -> dict[str, str]:
        """Device by logical name, of the weights that do not lie with the rest of the model.

        Raises:
            PlanError: a device that nobody declared; a weight that cannot lie apart, or an expert in pieces.
        """
        found = {name: device for name in slots if (device := self.other(choices[name])) is not None}
        whole: dict[str, dict[str | None, str]] = defaultdict(dict)  # expert → device → one of its weights
        for name, slot in slots.items() if found else ():
            expert = _EXPERT.match(slot.name)
            if expert is not None:
                whole[expert[1]].setdefault(found.get(name), name)
            elif name in found:
                raise self._no_expert(choices[name], slot)
        for devices in whole.values():
            if len(devices) > 1:
                (one, first), (other, second) = list(devices.items())[:2]
                raise PlanError(
                    f"Weight {first!r} lies on {one or self.primary} and {second!r} on {other or self.primary}: an "
                    "expert is on one device.",
                    remedy="Let the pattern end behind the expert's number: `.experts.{0-15}.*`.",
                )
        return found

    def _no_expert(self, choice: Choice, slot: Slot) -> PlanError:
        assert choice.device_rule is not None
        return PlanError(
            f"Rule {choice.device_rule.pattern!r} places {choice.name!r} ({slot.role}) on {choice.device}, and the "
            f"model runs on {self.primary}: only experts can lie apart.",
            remedy=f"Name experts alone, such as model.layers.*.mlp.experts.*, or set inference.device_map to "
            f"{choice.device}.",
        )

    # --- Room ---

    def shares_memory(self, device: str | None) -> bool:
        """Whether a device's memory is that of the one that the model runs on."""
        return device is None or torch_device(device) == self._device

    def has_limit(self, device: str) -> bool:
        """Whether there is less room for weights than memory."""
        return self._limits.get(device) is not None

    def check_there(self, planned: Iterable[PlannedWeight]) -> None:
        """
        Raises:
            ConfigError: weights are to lie on a card that this machine does not have.
        """
        for name in sorted({weight.device for weight in planned if weight.device is not None}):
            device, count = torch_device(name), torch.cuda.device_count()
            if device.type == "cuda" and (device.index or 0) >= count:
                raise ConfigError(
                    f"Weights are to lie on device {name!r}, and {count} CUDA devices are visible.",
                    remedy="Place them on cpu, or install a CUDA build of PyTorch.",
                )

    def note(self, weights: Iterable[tuple[PlannedWeight, PackedWeight]]) -> None:
        """Weights that have been loaded; they count for as long as they live."""
        sizes = [(planned.device, packed, 0 if packed.is_mapped else packed.nbytes) for planned, packed in weights]
        with self._lock:
            for device, packed, nbytes in sizes:
                self._weights[device][packed] = nbytes
                if device is not None:
                    self._uploaded[device] += nbytes

    def used_bytes(self, device: str | None) -> int:
        with self._lock:
            return sum(list(self._weights[device].values()))

    @property
    def uploaded_bytes(self) -> Mapping[str, int]:
        """Of weights, to each device beside the primary one, since the start."""
        with self._lock:
            return dict(self._uploaded)

    def room(self, device: str | None) -> DeviceRoom:
        """Of a device; None: the primary one, without what the KV cache will take of it."""
        limit, used = self._limits.get(device or self.primary), self.used_bytes(device)
        free = free_bytes(self._device if device is None else torch_device(device))
        left = free if limit is None else min(free, limit - used)
        return DeviceRoom(limit, used, max(0, left))

    def check_room(self, needed: Mapping[str | None, int], shared: Collection[PackedWeight] = ()) -> None:
        """
        Args:
            needed: bytes of new weights by device.
            shared: weights beside them that the version has in common with others.

        Raises:
            OutOfMemoryError: a device has too little left for them. The primary one is looked at if it has a limit.
        """
        for device, nbytes in needed.items():
            if device is None and not self.has_limit(self.primary):
                continue
            room = self.room(device)
            if nbytes > room.available_bytes:
                limit = "" if room.limit_bytes is None else f" of its {room.limit_bytes}"
                with self._lock:
                    others = room.used_bytes - sum(self._weights[device].get(weight, 0) for weight in shared)
                raise OutOfMemoryError(
                    f"The new weights take {nbytes} bytes on device {device or self.primary}, where those of all "
                    f"versions take {room.used_bytes}{limit}, and {room.available_bytes} are available. {others} bytes "
                    "there are of weights that the new version does not have.",
                    remedy="Place fewer experts there, choose smaller formats, raise inference.devices, or keep fewer "
                    "versions: unpin them, remove their names (GET /weights lists them), or wait for those that drain "
                    "or stay to go back to (engine.rollback_answers).",
                )


def bytes_by_device(planned: Sequence[PlannedWeight]) -> dict[str | None, int]:
    """What weights are expected to take in memory, by device; None: the primary one."""
    found: Counter[str | None] = Counter()
    for weight in planned:
        found[weight.device] += weight.memory_bytes
    return dict(found)
