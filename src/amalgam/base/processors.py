"""Which processors this process may compute on: cores, memory nodes, and the share of them that a container has.

In: the affinity mask, /proc and /sys. Out: cores, nodes and counts. Must never know: what computes there.

A core may have several processors (hyperthreads), which share its arithmetic: a second thread on a core gains nothing.
What is missing or cannot be read limits nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_ROOT = Path("/")


@dataclass(frozen=True)
class Core:
    """A physical core.

    Attributes:
        cpus: its processors that this process may use, in ascending order.
        node: the memory node that it is next to.
    """

    cpus: tuple[int, ...]
    node: int


def usable_threads(root: Path = _ROOT, affinity: Iterable[int] | None = None) -> int:
    """Threads that can compute at the same time: one for each core, and no more than the cgroup's quota has whole
    processors, since a quota that is used up stops all threads at once. At least 1.

    Args:
        root: where /proc and /sys are.
        affinity: processors that the process is allowed; None: ask the system.
    """
    cores, quota = len(usable_cores(root, affinity)), cpu_quota(root)
    return max(1, cores if quota is None else min(cores, int(quota)))


def usable_cores(root: Path = _ROOT, affinity: Iterable[int] | None = None) -> tuple[Core, ...]:
    """Cores with at least one processor that affinity and cpuset allow, those of a node one after the other."""
    cpus = _affinity() if affinity is None else set(affinity)
    for group in control_groups(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            found = _read(group / name)
            if found:
                cpus = cpus & set(parse_list(found)) or cpus
                break
    nodes = {
        cpu: int(folder.name.removeprefix("node"))
        for folder in (root / "sys/devices/system/node").glob("node[0-9]*")
        for cpu in parse_list(_read(folder / "cpulist") or "")
    }
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in sorted(cpus):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list") or str(cpu)
        cores.setdefault(tuple(parse_list(siblings)), []).append(cpu)
    found_cores = (Core(tuple(own), nodes.get(own[0], 0)) for own in cores.values())
    return tuple(sorted(found_cores, key=lambda core: (core.node, core.cpus)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Processors' worth of time that the cgroups of this process allow, the strictest of them; None without a limit.

    Both versions: `cpu.max` (v2), `cpu.cfs_quota_us` and `cpu.cfs_period_us` (v1).
    """
    limits = []
    for group in control_groups(root, "cpu"):
        quota, period = ([*(_read(group / "cpu.max") or "").split(), "", ""])[:2]
        if not quota:
            quota, period = (_read(group / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0:
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def parse_list(text: str) -> list[int]:
    """`0-3,8` → 0, 1, 2, 3, 8; empty where it is no such list."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return []
        numbers.extend(range(int(first), int(last or first) + 1))
    return numbers


def _affinity() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def control_groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the cgroups that this process is in, each with those above it, of v2 and of v1's `controller`.

    A container often sees its own group as the mount's root, and its path from outside of that.
    """
    mounts = list(_cgroup_mounts(root, controller))
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        is_v2 = number == "0" and not controllers
        if not is_v2 and controller not in controllers.split(","):
            continue
        for mount_is_v2, top, folder in mounts:
            if mount_is_v2 != is_v2:
                continue
            inner = PurePosixPath(path)
            parts = inner.relative_to(top).parts if inner.is_relative_to(top) else ()
            for depth in range(len(parts), -1, -1):
                yield folder.joinpath(*parts[:depth])


def _cgroup_mounts(root: Path, controller: str) -> Iterator[tuple[bool, str, Path]]:
    """Whether it is v2, which group is its top, where it is; of v1's mounts those of `controller`."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        fields, _, filesystem = line.partition(" - ")
        kind, *options = filesystem.split()
        top, folder = fields.split()[3:5]
        if kind == "cgroup2" or (kind == "cgroup" and controller in options[-1].split(",")):
            yield kind == "cgroup2", top, root / folder.lstrip("/")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
