"""What this machine has: processor, instruction sets, memory, and how much of it the container may use.

In: /proc, /sys and the control groups of this process. Out: `Machine`. Must never know: models, torch.

What is missing or cannot be read limits nothing.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from amalgam.base.processors import control_groups, cpu_quota, usable_cores, usable_threads

_ROOT = Path("/")
# What kernels are written for, by the names that Linux has for them; narrowest first.
_INSTRUCTION_SETS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_V1_UNLIMITED = 2**62  # cgroup v1 writes a number near 2^63 for no limit


@dataclass(frozen=True)
class Machine:
    """One machine, as this process may use it.

    Attributes:
        cores: physical ones that affinity and cpuset allow.
        nodes: memory nodes that they are next to.
        threads: that can compute at the same time: fewer than the cores where a quota says so.
        quota: processors' worth of time that the control groups allow; None: no limit.
        memory_bytes: all there is, or the strictest limit of the control groups.
        memory_limit: that limit; None: there is none below the machine's memory.
        available_bytes: what can still be taken.
    """

    processor: str
    cores: int
    nodes: int
    threads: int
    quota: float | None
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    memory_limit: int | None
    available_bytes: int


def detect_machine(root: Path = _ROOT, affinity: Iterable[int] | None = None) -> Machine:
    """
    Args:
        root: where /proc and /sys are.
        affinity: processors that the process is allowed; None: ask the system.
    """
    cpus = None if affinity is None else tuple(affinity)
    cores = usable_cores(root, cpus)
    described = _cpu_information(root)
    flags = set(described.get("flags", described.get("Features", "")).split())
    total, available = _installed(root)
    limit, room = _allowed(root)
    limited = limit is not None and limit < total
    return Machine(
        described.get("model name") or platform.processor() or platform.machine(),
        len(cores),
        len({core.node for core in cores}),
        usable_threads(root, cpus),
        cpu_quota(root),
        tuple(name for name in _INSTRUCTION_SETS if name in flags),
        min(total, limit) if limit is not None else total,
        limit if limited else None,
        min(available, room) if room is not None else available,
    )


@dataclass(frozen=True)
class ProcessFigures:
    """What one process takes, and may take.

    Attributes:
        memory: resident bytes by kind, see `resident_memory`.
        memory_limit: bytes: the machine's memory, or the strictest limit of the control groups.
        cpu_seconds: processor time so far.
        threads: that can compute at the same time.
    """

    memory: Mapping[str, int]
    memory_limit: int
    cpu_seconds: float
    threads: int


def this_process() -> ProcessFigures:
    """Of the process that asks."""
    machine = _this_machine()
    return ProcessFigures(resident_memory(), machine.memory_bytes, time.process_time(), machine.threads)


_this_machine = functools.cache(detect_machine)  # it reads many files, and nothing that changes is asked of it


def resident_memory(root: Path = _ROOT) -> dict[str, int]:
    """Bytes of this process that are in memory, by kind: `anonymous` stays there until it is freed or swapped, `mapped`
    are pages of files and of shared memory. Empty where the system does not tell.
    """
    fields = _fields(_read(root / "proc/self/status"))
    kinds = {"anonymous": ("RssAnon",), "mapped": ("RssFile", "RssShmem")}
    if any(key not in fields for keys in kinds.values() for key in keys):
        return {}
    return {kind: sum(int(fields[key].split()[0]) * 1024 for key in keys) for kind, keys in kinds.items()}


def _installed(root: Path) -> tuple[int, int]:
    """All memory, and what programs can still take: free, and pages of files that the system can drop."""
    found: dict[str, int] = {}
    for key, value in _fields(_read(root / "proc/meminfo")).items():
        number = value.split()[0] if value else ""
        if number.isdecimal():
            found[key] = int(number) * 1024
    total = found.get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, found.get("MemAvailable", total)


def _allowed(root: Path) -> tuple[int | None, int | None]:
    """The strictest limit of the control groups, and the least that any of them has left; None without a limit."""
    limits, rooms = [], []
    for group in control_groups(root, "memory"):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if limit is None or limit >= _V1_UNLIMITED:
            continue
        used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
        statistics = dict(line.partition(" ")[::2] for line in _read(group / "memory.stat").splitlines())
        # Pages of files count as used until somebody needs them.
        dropped = statistics.get("total_inactive_file") or statistics.get("inactive_file") or "0"
        limits.append(limit)
        rooms.append(max(0, limit - max(0, used - (int(dropped) if dropped.isdecimal() else 0))))
    return min(limits, default=None), min(rooms, default=None)


def _cpu_information(root: Path) -> Mapping[str, str]:
    """The fields of the first processor in /proc/cpuinfo."""
    return _fields(_read(root / "proc/cpuinfo").partition("\n\n")[0])


def _fields(text: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
