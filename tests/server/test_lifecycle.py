"""From the open port to the exit, in a process of its own: loading, draining, failing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.server.conftest import wait_until

ROOT = Path(__file__).parents[2]
Start = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts the fake server: `start(drain_seconds, load_seconds, step_seconds, fault)` → process, base URL."""
    processes = []

    def start(
        drain: float = 5, load: float = 0, step: float = 0.01, fault: str = ""
    ) -> tuple[subprocess.Popen[str], str]:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.fakes", str(port), str(drain), str(load), str(step), fault],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "src"},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        base_url = f"http://127.0.0.1:{port}"
        wait_until(lambda: answers(base_url), 20)
        return process, base_url

    yield start
    for process in processes:
        process.kill()
        process.communicate()


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
    return httpx.post(base_url + "/generate", json={"prompt": "a", **fields}, timeout=20)


def test_the_port_answers_while_the_model_loads(start: Start) -> None:
    _, base_url = start(load=1)
    assert httpx.get(base_url + "/health").json() == {"status": "loading"}
    assert httpx.get(base_url + "/").json()["status"] == "loading"
    for response in (httpx.get(base_url + "/ready"), generate(base_url), httpx.get(base_url + "/model_info")):
        assert response.status_code == 503
        assert "loading" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 0
    wait_until(lambda: is_ready(base_url))
    assert generate(base_url, max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_finishes_what_is_in_flight(start: Start, number: signal.Signals) -> None:
    process, base_url = start()
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(2) as pool:
        unary = pool.submit(generate, base_url, max_new_tokens=150)
        stream = pool.submit(generate, base_url, max_new_tokens=150, stream=True)
        wait_until(lambda: unary.running() and stream.running())
        wait_until(lambda: generate(base_url, max_new_tokens=1).status_code == 200)
        process.send_signal(number)
        wait_until(lambda: not is_ready(base_url), 0.5)
        assert httpx.get(base_url + "/health").json() == {"status": "draining"}
        refused = generate(base_url)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert unary.result().json()["generated_tokens"] == 150
        assert stream.result().text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in stream.result().text
    assert process.wait(5) == 0


def test_an_idle_server_too_says_that_it_drains(start: Start) -> None:
    process, base_url = start()
    wait_until(lambda: is_ready(base_url))
    process.terminate()
    wait_until(lambda: not is_ready(base_url), 0.5)
    assert process.wait(5) == 0


def test_a_drain_ends_in_time_and_streams_end_properly(start: Start) -> None:
    process, base_url = start(drain=1)
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(2) as pool:
        unary = pool.submit(generate, base_url, max_new_tokens=10_000)
        stream = pool.submit(generate, base_url, max_new_tokens=10_000, stream=True)
        wait_until(lambda: generate(base_url, max_new_tokens=20).status_code == 200)
        process.terminate()
        assert unary.result().status_code == 503
        *_, error, done = stream.result().text.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "unavailable"
        assert done == "data: [DONE]"
    assert process.wait(5) == 0


def test_the_second_signal_ends_at_once(start: Start) -> None:
    process, base_url = start(drain=60)
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(generate, base_url, max_new_tokens=10_000)
        wait_until(lambda: generate(base_url, max_new_tokens=20).status_code == 200)
        process.terminate()
        wait_until(lambda: not is_ready(base_url), 0.5)
        process.terminate()
        assert process.wait(1) == 128 + signal.SIGTERM
        assert isinstance(stream.exception(), httpx.TransportError)


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(start: Start) -> None:
    process, _ = start(load=0.5, fault="load")
    _, log = process.communicate(timeout=5)
    assert process.returncode != 0
    assert "Shard 'a.safetensors' is missing. Download it again." in log


def test_a_dead_engine_shows_in_health_and_in_the_exit(start: Start) -> None:
    process, base_url = start(load=0.5, fault="die")
    wait_until(lambda: httpx.get(base_url + "/health").status_code == 503, 2)
    assert generate(base_url).status_code == 503
    assert process.wait(6) != 0


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        process = subprocess.run(
            [sys.executable, "-m", "tests.server.fakes", str(port), "1", "0", "0"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "src"},
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    assert process.returncode != 0
    assert f"port {port}" in process.stderr
    assert "--port" in process.stderr
