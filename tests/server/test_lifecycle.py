"""From the open port to the exit, in a process of its own: loading, draining, failing."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from amalgam.server.http import access
from tests.server.conftest import wait_until
from tests.server.fakes import FakeDeployment

ROOT = Path(__file__).parents[2]
Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the fake server: `start(drain_seconds, held, fault)` → process, base URL; see `tests.server.fakes`."""
    processes = []

    def start(drain: float = 60, held: str = "", fault: str = "") -> tuple[subprocess.Popen[str], str]:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.fakes", str(port), str(drain), held, fault],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "src"},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        base_url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(base_url), 150)  # Python's start is slow on a busy machine
        return process, base_url

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def release(process: subprocess.Popen[str]) -> None:
    """Let go what is held."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def num_running(base_url: str) -> int:
    return int(httpx.get(base_url + "/serving").json()["running"])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def answers(base_url: str) -> bool:
    try:
        return httpx.get(base_url + "/health").status_code > 0
    except httpx.TransportError:
        return False


def is_ready(base_url: str) -> bool:
    return httpx.get(base_url + "/ready").status_code == 200


def generate(base_url: str, **fields: object) -> httpx.Response:
    return httpx.post(base_url + "/generate", json={"prompt": "a", **fields}, timeout=60)


def test_the_port_answers_while_the_model_loads(start: Start) -> None:
    process, base_url = start(held="load")
    assert httpx.get(base_url + "/health").json() == {"status": "loading"}
    assert httpx.get(base_url + "/").json()["status"] == "loading"
    for response in (httpx.get(base_url + "/ready"), generate(base_url), httpx.get(base_url + "/model_info")):
        assert response.status_code == 503
        assert "loading" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 0
    release(process)
    wait_until(lambda: is_ready(base_url))
    assert generate(base_url, max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_up_a_model_that_is_loading(start: Start, number: signal.Signals) -> None:
    process, base_url = start(held="load")
    process.send_signal(number)
    wait_until(lambda: process.poll() is not None or httpx.get(base_url + "/health").json() == {"status": "draining"})
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log and "terminate" not in log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_finishes_what_is_in_flight(start: Start, number: signal.Signals) -> None:
    process, base_url = start(held="steps")
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(2) as pool:
        unary = pool.submit(generate, base_url, max_new_tokens=150)
        stream = pool.submit(generate, base_url, max_new_tokens=150, stream=True)
        wait_until(lambda: num_running(base_url) == 2)
        process.send_signal(number)
        wait_until(lambda: not is_ready(base_url))
        assert httpx.get(base_url + "/health").json() == {"status": "draining"}
        refused = generate(base_url)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert not unary.done() and not stream.done()
        release(process)
        assert unary.result().json()["generated_tokens"] == 150
        assert stream.result().text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in stream.result().text
    assert process.wait(60) == 0


def test_an_idle_server_too_says_that_it_drains(start: Start) -> None:
    process, base_url = start(held="exit")
    wait_until(lambda: is_ready(base_url))
    process.terminate()
    wait_until(lambda: not is_ready(base_url))
    release(process)
    assert process.wait(60) == 0


def test_a_drain_ends_in_time_and_streams_end_properly(start: Start) -> None:
    process, base_url = start(drain=1, held="steps")
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(2) as pool:
        unary = pool.submit(generate, base_url)
        stream = pool.submit(generate, base_url, stream=True)
        wait_until(lambda: num_running(base_url) == 2)
        process.terminate()
        assert unary.result().status_code == 503
        *_, error, done = stream.result().text.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "unavailable"
        assert done == "data: [DONE]"
    assert process.wait(60) == 0


def test_without_descriptors_streams_go_on_and_the_log_stays_short(start: Start) -> None:
    process, base_url = start(held="steps")
    wait_until(lambda: is_ready(base_url))
    url = httpx.URL(base_url)
    with ThreadPoolExecutor(1) as pool, ExitStack() as connections:
        stream = pool.submit(generate, base_url, max_new_tokens=150, stream=True)
        wait_until(lambda: num_running(base_url) == 1)
        in_use = [int(name) for name in os.listdir(f"/proc/{process.pid}/fd")]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (max(in_use) + 6, max(in_use) + 6))
        for _ in range(200):
            connections.enter_context(socket.create_connection((url.host, url.port), timeout=60))
        time.sleep(3)  # asyncio tries again each second
        release(process)
        assert stream.result().text.endswith("data: [DONE]\n\n")
        connections.close()
        assert generate(base_url, max_new_tokens=1).status_code == 200
    process.terminate()
    _, log = process.communicate(timeout=60)
    assert log.count("no resources for a new connection") == 1
    assert "Traceback" not in log
    assert len(log.splitlines()) < 40


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_a_request_that_needs_a_descriptor_is_told_to_come_again(
    client: httpx.Client,
    deployment: FakeDeployment,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    def encode(text: str) -> list[int]:
        raise OSError(number, os.strerror(number), "/some/file")

    deployment.encode = encode
    monkeypatch.setattr(access, "shortage_log", access.ShortageLog())
    for _ in range(3):
        response = client.post("/generate", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["type"]) == (503, "unavailable")
        assert "retry-after" in response.headers
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1


def test_a_start_raises_the_limit_on_descriptors_and_names_the_dashboard(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))
    try:
        process, base_url = start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    wait_until(lambda: is_ready(base_url))
    process.terminate()
    _, log = process.communicate(timeout=60)
    [line] = [line for line in log.splitlines() if " ready after " in line]
    assert line.endswith(f"dashboard at {base_url}/dashboard")


def test_the_second_signal_ends_at_once(start: Start) -> None:
    process, base_url = start(drain=3600, held="steps")
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(generate, base_url)
        wait_until(lambda: num_running(base_url) == 1)
        process.terminate()
        wait_until(lambda: not is_ready(base_url))
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
        assert isinstance(stream.exception(), httpx.TransportError)


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(start: Start) -> None:
    process, _ = start(held="load", fault="load")
    _, log = process.communicate("\n", timeout=60)
    assert process.returncode != 0
    assert "Shard 'a.safetensors' is missing. Download it again." in log


def test_a_dead_engine_shows_in_health_and_in_the_exit(start: Start) -> None:
    process, base_url = start(held="exit", fault="die")
    wait_until(lambda: httpx.get(base_url + "/health").status_code == 503)
    assert generate(base_url).status_code == 503
    release(process)
    assert process.wait(60) != 0


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = subprocess.run(
            [sys.executable, "-m", "tests.server.fakes", str(port), "1"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "src"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert process.returncode != 0
    assert f"port {port}" in process.stderr
    assert "--port" in process.stderr
