"""`amalgam deploy ray`: what its flags refuse, and a cluster of its own where Ray is installed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.cli import main
from tests.server.conftest import wait_until


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
        ["--weights.history", "h.jsonl"],
    ],
)
def test_flags_that_contradict_each_other(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "ray", "--model", "models/demo", *flags]) == 2
    assert "Error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, subprocess.Popen[bytes]]]:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'amalgam-llm[ray]'")
    folder, port = tmp_path_factory.mktemp("ray"), free_port()
    flags = ["--replicas", "2", "--port", str(port), "--inference.max_seq_length", "256", "--engine.num_threads", "1"]
    command = [str(AMALGAM), "deploy", "ray", "--model", "models/demo", "--server.export_dir", str(folder), *flags]
    environment = os.environ | {"XDG_STATE_HOME": str(folder)}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                wait_until(lambda: is_ready(client, 2), seconds=150)
                yield client, process
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


@pytest.mark.timeout(400)
def test_a_cluster_on_ray(cluster: tuple[httpx.Client, subprocess.Popen[bytes]]) -> None:
    client, _ = cluster
    for number in range(4):
        assert ask(client, f"{number} is a number. " * 8)["generated_tokens"] == 4
    with client.stream("POST", "/generate", json={"prompt": "The sea", "max_new_tokens": 4, "stream": True}) as answer:
        events = [line for line in answer.iter_lines() if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["generated_tokens"] == 4
    assert client.get("/serving").json()["generated_tokens"] == 20
    assert client.get("/expert_stats").json()["summary"]["total_requests"] == 5

    pids = [
        int(line.partition('pid="')[2].partition('"')[0])
        for line in client.get("/metrics").text.splitlines()
        if line.startswith("amalgam_cluster_replica_info{")
    ]
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    for number in range(8):
        ask(client, f"Another one, {number}. " * 8)
    deadline = time.monotonic() + 120
    while not is_ready(client, 2):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert client.get("/serving").json()["generated_tokens"] >= 32
