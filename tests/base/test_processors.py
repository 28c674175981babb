"""Cores, quotas and nodes are read of the trees that Linux, Docker, Kubernetes and systemd show."""

from __future__ import annotations

from pathlib import Path

import pytest

from amalgam.base.processors import Core, cpu_quota, parse_list, usable_cores, usable_threads

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1_CPU = "33 31 0:29 {top} /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
V1_SET = "34 31 0:30 {top} /sys/fs/cgroup/cpuset ro - cgroup cgroup rw,cpuset\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def machine(root: Path, num_cores: int, siblings: int = 1, nodes: int = 1) -> Path:
    """Processor i belongs to core i % num_cores, as Linux numbers them; the nodes' cores follow each other."""
    files: dict[str, str] = {}
    for cpu in range(num_cores * siblings):
        own = ",".join(str(cpu % num_cores + num_cores * i) for i in range(siblings))
        files[f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"] = own + "\n"
    for node in range(nodes):
        cores = range(num_cores * node // nodes, num_cores * (node + 1) // nodes)
        own = ",".join(str(core + num_cores * i) for i in range(siblings) for core in cores)
        files[f"sys/devices/system/node/node{node}/cpulist"] = own + "\n"
    return tree(root, files)


def test_hyperthreads_of_a_core_count_once(tmp_path: Path) -> None:
    machine(tmp_path, 8, siblings=2)
    assert usable_threads(tmp_path, range(16)) == 8
    assert usable_threads(tmp_path, (0, 8)) == 1
    assert usable_threads(tmp_path, (0, 9, 10)) == 3


def test_processors_without_a_topology_are_cores(tmp_path: Path) -> None:
    assert usable_cores(tmp_path, (2, 0)) == (Core((0,), 0), Core((2,), 0))
    assert usable_threads(tmp_path, range(5)) == 5
    assert usable_threads(tmp_path, ()) == 1


def test_cores_of_a_node_follow_each_other(tmp_path: Path) -> None:
    machine(tmp_path, 4, siblings=2, nodes=2)
    assert usable_cores(tmp_path, range(8)) == (Core((0, 4), 0), Core((1, 5), 0), Core((2, 6), 1), Core((3, 7), 1))
    assert usable_cores(tmp_path, (7, 1)) == (Core((1,), 0), Core((7,), 1))


@pytest.mark.parametrize(
    ("limit", "quota", "threads"),
    [
        ("max 100000", None, 16),
        ("400000 100000", 4.0, 4),
        ("250000 100000", 2.5, 2),
        ("50000 100000", 0.5, 1),
        ("6400000 100000", 64.0, 16),
        ("damaged", None, 16),
        ("100000 0", None, 16),
    ],
)
def test_quota_of_v2(tmp_path: Path, limit: str, quota: float | None, threads: int) -> None:
    machine(tmp_path, 16)
    files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": limit + "\n"}
    tree(tmp_path, files)
    assert cpu_quota(tmp_path) == quota
    assert usable_threads(tmp_path, range(16)) == threads


def test_the_strictest_group_above_counts(tmp_path: Path) -> None:
    tree(
        machine(tmp_path, 16),
        {
            "proc/self/cgroup": "0::/system.slice/amalgam.service\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/system.slice/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/system.slice/amalgam.service/cpu.max": "800000 100000\n",
        },
    )
    assert usable_threads(tmp_path, range(16)) == 3


@pytest.mark.parametrize(
    ("path", "top"), [("/", "/"), ("/docker/4c7e", "/docker/4c7e"), ("/kubepods/pod1/4c7e", "/kubepods/pod1/4c7e")]
)
def test_quota_of_v1(tmp_path: Path, path: str, top: str) -> None:
    files = {
        "proc/self/cgroup": f"11:cpu,cpuacct:{path}\n10:cpuset:{path}\n9:name=systemd:{path}\n0::/\n",
        "proc/self/mountinfo": V1_CPU.format(top=top) + V1_SET.format(top=top),
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "350000\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpuset/cpuset.cpus": "0-9\n",
    }
    tree(machine(tmp_path, 16), files)
    assert cpu_quota(tmp_path) == 3.5
    assert usable_threads(tmp_path, range(16)) == 3
    tree(tmp_path, {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n"})
    assert cpu_quota(tmp_path) is None
    assert usable_threads(tmp_path, range(16)) == 10


def test_cpuset_of_v2_and_affinity_meet(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": V2,
        "sys/fs/cgroup/box/cpuset.cpus.effective": "4-7,12-15\n",
        "sys/fs/cgroup/cpuset.cpus.effective": "0-15\n",
    }
    tree(machine(tmp_path, 8, siblings=2), files)
    assert usable_threads(tmp_path, range(16)) == 4
    assert [core.cpus for core in usable_cores(tmp_path, (5, 6, 13, 0))] == [(5, 13), (6,)]
    tree(tmp_path, {"sys/fs/cgroup/box/cpuset.cpus.effective": "\n"})
    assert usable_threads(tmp_path, range(16)) == 8


def test_a_mount_of_another_group_is_no_limit(tmp_path: Path) -> None:
    """A container that sees the path from outside, but a mount whose top is itself."""
    tree(
        machine(tmp_path, 4),
        {
            "proc/self/cgroup": "0::/../../outer\n",
            "proc/self/mountinfo": "1 2 0:26 /../../inner /sys/fs/cgroup ro - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/cpu.max": "200000 100000\n",
        },
    )
    assert usable_threads(tmp_path, range(4)) == 2


def test_lists() -> None:
    assert parse_list("0-2,7,9-10\n") == [0, 1, 2, 7, 9, 10]
    assert parse_list("") == parse_list("0-x") == []


def test_this_machine() -> None:
    assert 1 <= usable_threads() <= len(usable_cores())
