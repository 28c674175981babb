"""How much memory there is, and how much this process takes.

In: a device. Out: bytes. Must never know: models.
"""

from __future__ import annotations

import os
import resource
import sys
from itertools import chain
from pathlib import Path

import torch

_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # cgroups 2 and 1
_STATUS = "/proc/self/status"
STATES_PER_SEQUENCE = 2  # slots for recurrent states: its own, and one that others can start from


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # MemAvailable counts the page cache in, which the pages of a checkpoint just read have filled.
    available = _read_kib("/proc/meminfo", "MemAvailable")
    if available is None:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = chain.from_iterable(map(_read_lines, _CONTAINER_LIMITS))
    return min([available, *(int(limit) for limit in limits if limit.isdecimal())])


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
