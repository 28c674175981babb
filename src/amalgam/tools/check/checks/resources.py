"""Memory, disk and descriptors of the machine, as /proc or the server's metrics have them."""

from __future__ import annotations

import shutil
from pathlib import Path

from amalgam.base.machine import detect_machine
from amalgam.tools.check import configured, metrics
from amalgam.tools.check.contract import AFTER_LOAD, Finding, check, failed, passed, skipped, warned
from amalgam.tools.check.failures import CannotTellError
from amalgam.tools.check.process import descriptors, name_of, resident_bytes, working_folder
from amalgam.tools.check.target import Target

_GIB = 2**30
_NOT_HERE = "The server's process is not on this machine (or in another namespace): --pid names it."


@check(
    "resources.memory",
    "Memory",
    why="A machine without memory ends the largest process, which is the server.",
    remedy="A smaller KV cache, fewer bits in the weights, more memory; a limit that is the container's own.",
    requests=1,
    order=AFTER_LOAD,
)
async def memory(target: Target) -> Finding:
    wanted, pid = target.thresholds.resources, target.process
    if pid is None:
        return await _remote_memory(target)
    machine, resident = detect_machine(), resident_bytes(pid)
    share = 1 - machine.available_bytes / machine.memory_bytes
    value = (
        f"{resident / _GIB:.2f} GiB resident ({name_of(pid)}, process {pid}, from /proc); "
        f"{share:.0%} of {machine.memory_bytes / _GIB:.1f} GiB in use by all"
    )
    threshold = f"≤ {wanted.memory_share:.0%} in use, failure above {wanted.memory_share_fail:.0%}"
    figures = {"resident_bytes": resident, "memory_bytes": machine.memory_bytes, "share": share}
    if share > wanted.memory_share_fail or 0 < wanted.memory_bytes < resident:
        return failed(value, _with_bytes(threshold, wanted.memory_bytes), figures=figures)
    if share > wanted.memory_share:
        return warned(value, _with_bytes(threshold, wanted.memory_bytes), figures=figures)
    return passed(value, _with_bytes(threshold, wanted.memory_bytes), figures=figures)


def _with_bytes(threshold: str, limit: int) -> str:
    return f"{threshold}; ≤ {limit / _GIB:.2f} GiB resident" if limit else threshold


async def _remote_memory(target: Target) -> Finding:
    """From the metrics, which do not say how much there is."""
    try:
        resident = metrics.resident_bytes(metrics.parse(await target.metrics()))
    except (CannotTellError, ValueError):
        resident = None
    if resident is None:
        return skipped(f"{_NOT_HERE} Its metrics have no process_resident_memory_bytes.")
    limit = target.thresholds.resources.memory_bytes
    value = f"{resident / _GIB:.2f} GiB resident (process_resident_memory_bytes of its metrics)"
    if not limit:
        return skipped(f"{value}; resources.memory_bytes, which it is judged by, is not set.")
    threshold = f"≤ {limit / _GIB:.2f} GiB"
    verdict = failed if resident > limit else passed
    return verdict(value, threshold, figures={"resident_bytes": resident})


@check(
    "resources.disk",
    "Disk",
    why="A full disk loses logs, statistics and the packed cache, and the next model does not fit.",
    remedy="Make room, rotate logs.",
    order=AFTER_LOAD,
)
async def disk(target: Target) -> Finding:
    pid, least = target.process, target.thresholds.resources.disk_free_bytes
    folders = [working_folder(pid)] if pid is not None else []
    folders += [path.parent for path in (target.evidence.log, target.evidence.server_config) if path is not None]
    folders += configured.written_folders(target)
    if not (places := [folder for folder in folders if folder is not None]):
        return skipped(_NOT_HERE)
    mounts = sorted({_mount_of(place.absolute()) for place in places})
    free = {mount: shutil.disk_usage(mount).free for mount in mounts}
    value = ", ".join(f"{size / 1e9:.1f} GB free at {path}" for path, size in free.items())
    threshold, scarcest = f"≥ {least / 1e9:.0f} GB", min(free.values())
    figures = {"free_bytes": {str(path): size for path, size in free.items()}}
    if scarcest >= least:
        return passed(value, threshold, figures=figures)
    return (failed if scarcest < least / 2 else warned)(value, threshold, figures=figures)


def _mount_of(path: Path) -> Path:
    """Where the disk begins that holds a folder, or would if it were made."""
    path = path.resolve()
    while not path.is_mount():
        path = path.parent
    return path


@check(
    "resources.descriptors",
    "Descriptors",
    why="Each connection takes one; without any left a server accepts nobody, or ends.",
    remedy="Raise the limit (LimitNOFILE, ulimit -n), and look for connections that nobody closes.",
    order=AFTER_LOAD,
)
async def open_files(target: Target) -> Finding:
    pid = target.process
    found = None if pid is None else descriptors(pid)
    if found is None:
        return skipped(_NOT_HERE if pid is None else f"Process {pid} is another user's.")
    count, limit = found
    most = target.thresholds.resources.descriptors_share
    value, threshold = f"{count} of {limit:,} open", f"≤ {most:.0%}"
    return (warned if count > most * limit else passed)(value, threshold, figures={"open": count, "limit": limit})
