"""How much memory there is, and how much this process takes.

In: a device. Out: bytes. Must never know: models.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from amalgam.kernels.devices import free_bytes

_STATUS = "/proc/self/status"
STATES_PER_SEQUENCE = 2  # slots for recurrent states: its own, and one that others can start from


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    return free_bytes(device)


def resident_bytes() -> int:
    """Resident memory of this process now; where the system does not tell, its peak."""
    resident = _read_kib(_STATUS, "VmRSS")
    return peak_memory_bytes() if resident is None else resident


def peak_memory_bytes() -> int:
    """Most resident memory that this process has had."""
    # getrusage would count what the parent had when it started this process.
    peak = _read_kib(_STATUS, "VmHWM")
    if peak is not None:
        return peak
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def _read_kib(path: str, key: str) -> int | None:
    """The bytes of a line `key:  1234 kB`."""
    for line in _read_lines(path):
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _read_lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
