"""What a machine has is read of the trees that Linux and containers show."""

from __future__ import annotations

from pathlib import Path

import pytest

from amalgam.base.machine import detect_machine, resident_memory
from tests.base.test_processors import V2, machine, tree

GIB = 2**30
MEMORY = f"MemTotal: {64 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {40 * 2**20} kB\n"
CPU = "processor: 0\nmodel name\t: Some Xeon\nflags\t\t: fpu {flags} lm\n\nprocessor: 1\nflags: other\n"
V1 = "33 31 0:29 / /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    machine(tmp_path, 8, siblings=2, nodes=2)
    flags = "avx2 fma avx512f amx_tile amx_int8"
    return tree(tmp_path, {"proc/meminfo": MEMORY, "proc/cpuinfo": CPU.format(flags=flags)})


def test_a_machine_without_limits(root: Path) -> None:
    found = detect_machine(root, range(16))
    assert (found.processor, found.cores, found.nodes, found.threads, found.quota) == ("Some Xeon", 8, 2, 8, None)
    assert found.instruction_sets == ("avx2", "fma", "avx512f", "amx_tile", "amx_int8")
    assert (found.memory_bytes, found.available_bytes, found.memory_limit) == (64 * GIB, 40 * GIB, None)


def test_a_container_has_its_limit_less_what_it_uses_and_cannot_drop(root: Path) -> None:
    group = {"memory.max": f"{16 * GIB}\n", "memory.current": f"{6 * GIB}\n", "cpu.max": "250000 100000\n"}
    statistics = {"memory.stat": f"anon 5\ninactive_file {4 * GIB}\n"}
    files = {f"sys/fs/cgroup/{name}": text for name, text in (group | statistics).items()}
    tree(root, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, **files})
    found = detect_machine(root, range(16))
    assert (found.memory_bytes, found.available_bytes, found.memory_limit) == (16 * GIB, 14 * GIB, 16 * GIB)
    assert (found.cores, found.threads, found.quota) == (8, 2, 2.5)


@pytest.mark.parametrize(
    ("limit", "memory", "available"), [(str(8 * GIB), 8, 7), ("9223372036854771712", 64, 40), ("much", 64, 40)]
)
def test_a_limit_of_v1(root: Path, limit: str, memory: int, available: int) -> None:
    folder = "sys/fs/cgroup/memory"
    files = {f"{folder}/memory.limit_in_bytes": limit, f"{folder}/memory.usage_in_bytes": str(GIB)}
    tree(root, {"proc/self/cgroup": "5:memory:/\n", "proc/self/mountinfo": V1, **files})
    found = detect_machine(root, range(16))
    assert (found.memory_bytes, found.available_bytes) == (memory * GIB, available * GIB)


def test_a_limit_above_the_machine_limits_nothing(root: Path) -> None:
    files = {"sys/fs/cgroup/memory.max": str(2**45)}
    tree(root, {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, **files})
    found = detect_machine(root, range(16))
    assert (found.memory_bytes, found.available_bytes, found.memory_limit) == (64 * GIB, 40 * GIB, None)


def test_a_machine_that_tells_nothing_is_there_all_the_same(tmp_path: Path) -> None:
    found = detect_machine(tmp_path, (0,))
    assert found.cores == found.threads == 1 and found.instruction_sets == ()
    assert 0 < found.available_bytes <= found.memory_bytes


def test_resident_memory_by_kind(tmp_path: Path) -> None:
    status = tmp_path / "proc/self/status"
    status.parent.mkdir(parents=True)
    status.write_text("Name:\tamalgam\nVmRSS:\t 70 kB\nRssAnon:\t 40 kB\nRssFile:\t 20 kB\nRssShmem:\t 10 kB\n")
    assert resident_memory(tmp_path) == {"anonymous": 40 * 1024, "mapped": 30 * 1024}
    status.write_text("Name:\tamalgam\nVmRSS:\t 70 kB\n")
    assert resident_memory(tmp_path) == {}
