"""From the open port to the exit, in a process of its own: loading, draining, failing."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.server.http import access
from tests.server.conftest import wait_until
from tests.server.fakes import FakeDeployment, serve, url_told


@dataclass(frozen=True)
class Server:
    """A fake server in a process of its own; see `tests.server.fakes.serve`."""

    process: ForkServerProcess
    url: str
    log_file: Path
    let_go: Connection

    def release(self) -> None:
        """Let go what is held."""
        self.let_go.send(None)

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self) -> int:
        """Its exit code."""
        self.process.join(60)
        assert self.process.exitcode is not None
        return self.process.exitcode

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")


Start = Callable[..., Server]


@pytest.fixture
def start(context: ForkServerContext, tmp_path: Path) -> Iterator[Start]:
    """Starts the fake server: `start(log=…, drain=…, held=…, fault=…)`."""
    processes = []

    def start(taken_port: int | None = None, log: Path = tmp_path / "log", **how: Any) -> Server:
        released, let_go = context.Pipe()
        process = context.Process(target=serve, args=(taken_port or 0, released, log), kwargs=how)
        process.start()
        processes.append(process)
        if taken_port is not None:
            return Server(process, f"http://127.0.0.1:{taken_port}", log, let_go)
        server = Server(process, url_told(let_go), log, let_go)
        wait_until(lambda: answers(server.url))
        return server

    yield start
    for process in processes:
        process.kill()
        process.join()


def num_running(base_url: str) -> int:
    return int(httpx.get(base_url + "/serving", timeout=60).json()["running"])


def answers(base_url: str) -> bool:
    try:
        return httpx.get(base_url + "/health", timeout=60).status_code > 0
    except httpx.TransportError:
        return False


def is_ready(base_url: str) -> bool:
    return httpx.get(base_url + "/ready", timeout=60).status_code == 200


def generate(base_url: str, **fields: object) -> httpx.Response:
    return httpx.post(base_url + "/generate", json={"prompt": "a", **fields}, timeout=60)


def test_the_port_answers_while_the_model_loads(start: Start) -> None:
    server = start(held="load")
    base_url = server.url
    assert httpx.get(base_url + "/health", timeout=60).json() == {"status": "loading"}
    assert httpx.get(base_url + "/", timeout=60).json()["status"] == "loading"
    for response in (
        httpx.get(base_url + "/ready", timeout=60),
        generate(base_url),
        httpx.get(base_url + "/model_info", timeout=60),
    ):
        assert response.status_code == 503
        assert "loading" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) > 0
    server.release()
    wait_until(lambda: is_ready(base_url))
    assert generate(base_url, max_new_tokens=1).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_gives_up_a_model_that_is_loading(start: Start, number: signal.Signals) -> None:
    server = start(held="load")
    server.signal(number)
    assert server.wait() == 0
    assert "Traceback" not in server.log and "terminate" not in server.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_finishes_what_is_in_flight(start: Start, number: signal.Signals) -> None:
    server = start(held="steps")
    base_url = server.url
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(2) as pool:
        unary = pool.submit(generate, base_url, max_new_tokens=150)
        stream = pool.submit(generate, base_url, max_new_tokens=150, stream=True)
        wait_until(lambda: num_running(base_url) == 2)
        server.signal(number)
        wait_until(lambda: not is_ready(base_url))
        assert httpx.get(base_url + "/health", timeout=60).json() == {"status": "draining"}
        refused = generate(base_url)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert not unary.done() and not stream.done()
        server.release()
        assert unary.result().json()["generated_tokens"] == 150
        assert stream.result().text.endswith("data: [DONE]\n\n")
        assert '"finish_reason":"length"' in stream.result().text
    assert server.wait() == 0


def test_an_idle_server_too_says_that_it_drains(start: Start) -> None:
    server = start(held="exit")
    base_url = server.url
    wait_until(lambda: is_ready(base_url))
    server.signal()
    wait_until(lambda: not is_ready(base_url))
    server.release()
    assert server.wait() == 0


def test_a_drain_ends_in_time_and_streams_end_properly(start: Start) -> None:
    server = start(drain=1, held="steps")
    base_url = server.url
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(2) as pool:
        unary = pool.submit(generate, base_url)
        stream = pool.submit(generate, base_url, stream=True)
        wait_until(lambda: num_running(base_url) == 2)
        server.signal()
        assert unary.result().status_code == 503
        assert "The engine has stopped." in unary.result().json()["error"]["message"]
        *_, error, done = stream.result().text.strip().split("\n\n")
        told = json.loads(error.removeprefix("data: "))["error"]
        assert told["type"] == "unavailable" and "The engine has stopped." in told["message"]
        assert done == "data: [DONE]"
    assert server.wait() == 0


def test_without_descriptors_streams_go_on_and_the_log_stays_short(start: Start) -> None:
    server = start(held="steps")
    base_url = server.url
    wait_until(lambda: is_ready(base_url))
    url = httpx.URL(base_url)
    with ThreadPoolExecutor(1) as pool, ExitStack() as connections:
        stream = pool.submit(generate, base_url, max_new_tokens=150, stream=True)
        wait_until(lambda: num_running(base_url) == 1)
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        limit = max(int(path.name) for path in descriptors.iterdir()) + 6
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (limit, limit))
        for _ in range(20):  # asyncio takes a few of them each second
            connections.enter_context(socket.create_connection((url.host, url.port), timeout=60))
        wait_until(lambda: "no resources for a new connection" in server.log)
        server.release()
        assert stream.result().text.endswith("data: [DONE]\n\n")
        connections.close()
        assert generate(base_url, max_new_tokens=1).status_code == 200
    server.signal()
    assert server.wait() == 0
    assert server.log.count("no resources for a new connection") == 1
    assert "Traceback" not in server.log
    assert len(server.log.splitlines()) < 40


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
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    server = start(files=min(256, hard))
    assert server.process.pid is not None
    assert resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    wait_until(lambda: is_ready(server.url))
    server.signal()
    assert server.wait() == 0
    [line] = [line for line in server.log.splitlines() if " ready after " in line]
    assert line.endswith(f"dashboard at {server.url}/dashboard")


def test_the_second_signal_ends_at_once(start: Start) -> None:
    server = start(drain=3600, held="steps")
    base_url = server.url
    wait_until(lambda: is_ready(base_url))
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(generate, base_url)
        wait_until(lambda: num_running(base_url) == 1)
        server.signal()
        wait_until(lambda: not is_ready(base_url))
        server.signal()
        assert server.wait() == 128 + signal.SIGTERM
        assert isinstance(stream.exception(), httpx.TransportError)


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(start: Start) -> None:
    server = start(held="load", fault="load")
    server.release()
    assert server.wait() != 0
    assert "Shard 'a.safetensors' is missing. Download it again." in server.log


def test_a_dead_engine_shows_in_health_and_in_the_exit(start: Start) -> None:
    server = start(held="exit", fault="die")
    base_url = server.url
    wait_until(lambda: httpx.get(base_url + "/health", timeout=60).status_code == 503)
    assert generate(base_url).status_code == 503
    server.release()
    assert server.wait() != 0


def test_a_taken_port_is_an_error_that_names_it(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        server = start(port)
        assert server.wait() != 0
    assert f"port {port}" in server.log
    assert "--port" in server.log


def test_a_drain_ends_openai_s_streams_properly(start: Start) -> None:
    server = start(drain=1, held="steps")
    wait_until(lambda: is_ready(server.url))
    body = {"model": "fake", "prompt": "a", "stream": True}
    with ThreadPoolExecutor(1) as pool:
        stream = pool.submit(httpx.post, server.url + "/v1/completions", json=body, timeout=60)
        wait_until(lambda: num_running(server.url) == 1)
        server.signal()
        *_, error, done = stream.result().text.strip().split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
        assert done == "data: [DONE]"
    assert server.wait() == 0


def test_keys_are_read_again_at_a_signal(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("first")
    server = start(keys=str(keys))
    wait_until(lambda: is_ready(server.url))

    def status(key: str) -> int:
        return httpx.get(server.url + "/model_info", headers={"x-api-key": key}, timeout=60).status_code

    assert (status("first"), status("second")) == (200, 401)
    keys.write_text("")  # a file that cannot be used changes nothing
    server.signal(signal.SIGHUP)
    wait_until(lambda: "SIGHUP: nothing has changed" in server.log)
    assert status("first") == 200
    keys.write_text("second")
    server.signal(signal.SIGHUP)
    wait_until(lambda: status("second") == 200)
    assert status("first") == 401
    server.signal()
    assert server.wait() == 0
    assert "first" not in server.log and "second" not in server.log
