"""Devices by name, and how much of their memory weights may take.

In: text. Out: names that compare equal for one device, bytes. Must never know: torch, which devices there are.

    cpu       the processors and their memory
    cuda:N    a card; `cuda` is the first one
    cpu:N     a second backend on the same processors, which stands in for a card: it has a budget of its own, and what
              goes to it and comes back is counted
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

_DEVICE = re.compile(r"(cpu|cuda)(?::(\d{1,3}))?")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(B|[KMGT]i?B)")


def device_name(text: str) -> str:
    """The shortest name of a device: `cuda:0` is `cuda`.

    Raises:
        ValueError: it is no name of a device.
    """
    found = _DEVICE.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(
            f"device {text[:80]!r} is unknown. Expected cpu, cuda, cuda:N, or cpu:N for a stand-in of a card"
        )
    kind, number = found[1], int(found[2] or 0)
    return f"{kind}:{number}" if number else kind


def is_stand_in(name: str) -> bool:
    """Whether a device is processors that stand in for a card."""
    return name.startswith("cpu:")


def size_in_bytes(text: str) -> int:
    """`24GB`, `1.5GiB`.

    Raises:
        ValueError: it is no size, or none at all.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise ValueError(f"memory is {text[:80]!r}. Expected for instance 24GB or 22.5GiB")
    return int(float(found[1]) * UNITS.get(found[2], 1))


def _checked_size(text: str) -> str:
    if text:
        size_in_bytes(text)
    return text


DeviceName = Annotated[str, AfterValidator(device_name)]
MemorySize = Annotated[str, AfterValidator(_checked_size)]
"""Empty: no limit but the device's own."""
