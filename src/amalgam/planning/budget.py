"""A budget as people say it: `40GB`, `4.5bpw`, `30tok/s`. Must never know: models."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from amalgam.errors import ConfigError, describe

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_BUDGET = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(B|[KMGT]i?B|bpw|tok/s)")


@dataclass(frozen=True)
class Budget:
    """What a plan may take.

    Attributes:
        kind: bytes: all that the model takes in memory, KV cache and workspace included; bits: mean bits of a weight
            that has a choice, as stored, with scales; speed: tokens a second of one sequence, at least.
        text: as it was given.
    """

    kind: Literal["bytes", "bits", "speed"]
    value: float
    text: str


def parse_budget(text: str) -> Budget:
    """
    Raises:
        ConfigError: it is no budget, or none that anything could keep.
    """
    found = _BUDGET.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(
            f"--budget is {describe(text)}.", remedy="Expected for instance 40GB, 38.5GiB, 4.5bpw or 30tok/s."
        )
    value, unit = float(found[1]), found[2]
    if unit == "bpw":
        return Budget("bits", value, text)
    if unit == "tok/s":
        return Budget("speed", value, text)
    return Budget("bytes", value * _UNITS.get(unit, 1), text)
