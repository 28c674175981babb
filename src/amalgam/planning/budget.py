"""A budget as people say it: `40GB`, `4.5bpw`, `30tok/s`, `cuda=24GB,cpu=128GB`. Must never know: models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from amalgam.config.devices import UNITS, device_name
from amalgam.errors import ConfigError, describe
from amalgam.planning.cards import Card, parse_card

_BUDGET = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(B|[KMGT]i?B|bpw|tok/s)")


@dataclass(frozen=True)
class DeviceBudget:
    """What a plan may take on one device; `memory` says how fast that is read, too, where it is known."""

    name: str
    memory: Card


@dataclass(frozen=True)
class Budget:
    """What a plan may take.

    Attributes:
        kind: bytes: all that the model takes in memory, KV cache and workspace included; bits: mean bits of a weight
            that has a choice, as stored, with scales; speed: tokens a second of one sequence, at least.
        text: as it was given.
        devices: how the bytes are divided; empty: there is one device.
    """

    kind: Literal["bytes", "bits", "speed"]
    value: float
    text: str
    devices: tuple[DeviceBudget, ...] = ()

    @property
    def primary(self) -> int:
        """Index of the device that computes all but the experts that lie elsewhere: the first that is not the CPU."""
        return next((index for index, each in enumerate(self.devices) if each.name != "cpu"), 0)


def parse_budget(text: str) -> Budget:
    """
    Raises:
        ConfigError: it is no budget, or none that anything could keep.
    """
    if "=" in text:
        devices = _devices(text)
        return Budget("bytes", sum(each.memory.memory_bytes for each in devices), text, devices)
    found = _BUDGET.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(
            f"--budget is {describe(text)}.",
            remedy="Expected for instance 40GB, 38.5GiB, 4.5bpw, 30tok/s or cuda=24GB,cpu=128GB.",
        )
    value, unit = float(found[1]), found[2]
    if unit == "bpw":
        return Budget("bits", value, text)
    if unit == "tok/s":
        return Budget("speed", value, text)
    return Budget("bytes", value * UNITS.get(unit, 1), text)


def _devices(text: str) -> tuple[DeviceBudget, ...]:
    """`cuda=24GB,cpu=128GB`: of each device a size, a size and a bandwidth, or a known card."""
    found: dict[str, DeviceBudget] = {}
    for part in text.split(","):
        name, _, memory = part.partition("=")
        try:
            device = device_name(name)
        except ValueError as error:
            raise ConfigError(
                f"--budget is {describe(text)}: {error}.", remedy="Expected for instance cuda=24GB,cpu=128GB."
            ) from None
        if device in found:
            raise ConfigError(f"--budget names {device} twice.", remedy="Give each device once.")
        found[device] = DeviceBudget(device, parse_card(memory, f"--budget of {device}"))
    if len(found) < 2:
        raise ConfigError(
            f"--budget is {describe(text)}, which names one device.",
            remedy="Name two or more, such as cuda=24GB,cpu=128GB; of one, give the bytes alone.",
        )
    return tuple(found.values())
