"""`amalgam deploy ray`: what its flags refuse, and a cluster of its own where Ray is installed."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.cli import main
from tests.conftest import write_demo_config
from tests.server.conftest import wait_until

EXPERTS = "model.layers.3.mlp.experts.*"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


AMALGAM = Path(sys.executable).with_name("amalgam")


@pytest.mark.parametrize(
    "flags",
    [
        ["--replicas", "2", "--max-replicas", "3"],
        ["--min-replicas", "2"],
        ["--min-replicas", "3", "--max-replicas", "2"],
        ["--status", "--stop"],
        ["--json"],
        ["--weights.watch_seconds", "1"],
    ],
)
def test_flags_that_contradict_each_other(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "ray", "--model", "models/demo", *flags]) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[httpx.Client, Path]]:
    """A cluster, and the state folder that its processes have been told."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: make cluster")
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    config = write_demo_config(folder, request.getfixturevalue("derived"))
    flags = ["--replicas", "2", "--port", str(port), "--inference.max_seq_length", "256", "--engine.num_threads", "1"]
    flags += ["--server.export_dir", str(folder), "--weights.history", str(folder / "history.jsonl")]
    command = [str(AMALGAM), "deploy", "ray", "--config", str(config), *flags]
    environment = os.environ | {"XDG_STATE_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_until(lambda: process.poll() is not None or is_ready(client, 2), seconds=400)
                assert process.poll() is None, (folder / "log").read_text()
                yield client, folder
            assert process.poll() is None, (folder / "log").read_text()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (folder / "log").read_text()
        finally:
            process.kill()


def is_ready(client: httpx.Client, num_replicas: int) -> bool:
    try:
        text = client.get("/metrics").text
    except httpx.HTTPError:
        return False
    return f'amalgam_cluster_replicas{{state="ready"}} {num_replicas}.0' in text


def ask(client: httpx.Client, prompt: str) -> dict[str, Any]:
    answer = client.post("/generate", json={"prompt": prompt, "max_new_tokens": 4})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.timeout(1200)
def test_a_cluster_on_ray(cluster: tuple[httpx.Client, Path]) -> None:
    client, folder = cluster
    for number in range(4):
        assert ask(client, f"{number} is a number. " * 8)["generated_tokens"] == 4
    with client.stream("POST", "/generate", json={"prompt": "The sea", "max_new_tokens": 4, "stream": True}) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["generated_tokens"] == 4
    wait_until(lambda: client.get("/serving").json()["generated_tokens"] == 20)  # a quarter of a second later
    wait_until(lambda: client.get("/expert_stats").json()["summary"]["total_requests"] == 5)

    pids = pids_of(client)
    assert len(pids) == 2
    assert remap(client, "fp8").json()["weight_version"] == 2
    with unable_to_open_files(pids[0]):
        failed = remap(client, "int4")
    assert failed.status_code >= 400, failed.text
    assert versions(client) == [2, 2]
    assert ask(client, "The sea")["weight_version"] == 2
    again = remap(client, "int4").json()["weight_version"]
    assert versions(client) == [again, again]

    os.kill(pids[0], signal.SIGKILL)
    for number in range(8):
        ask(client, f"Another one, {number}. " * 8)
    wait_until(lambda: pids[0] not in pids_of(client) and is_ready(client, 2), seconds=300)
    assert versions(client) == [again, again]
    wait_until(lambda: client.get("/serving").json()["generated_tokens"] >= 36)

    os.kill(pid_of_gateway(folder), signal.SIGKILL)
    wait_until(lambda: is_ready(client, 2), seconds=300)
    assert ask(client, "The sea")["weight_version"] == again
    back = client.post("/weights/rollback").json()  # the history knows to what
    assert versions(client) == [back["weight_version"]] * 2
    assert back["num_changed"] > 0


def pids_of(client: httpx.Client) -> list[int]:
    """Of the replicas."""
    return [
        int(line.partition('pid="')[2].partition('"')[0])
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("amalgam_cluster_replica_info{")
    ]


def versions(client: httpx.Client) -> list[int]:
    """That each replica has in use. What is known of replicas is a quarter of a second old."""
    time.sleep(1.0)
    lines = client.get("/metrics").text.splitlines()
    return [int(float(line.split()[-1])) for line in lines if line.startswith("amalgam_cluster_weight_version{")]


def remap(client: httpx.Client, source: str) -> httpx.Response:
    return client.post("/update_weight_mapping", json={"weight_mapping": {EXPERTS: source}})


@contextmanager
def unable_to_open_files(pid: int) -> Iterator[None]:
    """As if a disk had failed for one process."""
    numbers = {int(name) for name in os.listdir(f"/proc/{pid}/fd")}
    lowest_free = min(set(range(len(numbers) + 1)) - numbers)
    _, most = before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, most))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def pid_of_gateway(state_folder: Path) -> int:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            is_gateway = b"ServeReplica:amalgam:Gateway" in (folder / "cmdline").read_bytes()
            if is_gateway and f"XDG_STATE_HOME={state_folder}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    [pid] = found
    return pid
