"""Load, clients that leave, an engine that dies, a log that cannot be written: nothing is lost, nothing is kept."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from amalgam.server import create_app
from amalgam.server.http.lifecycle import DrainingServer, listen, url_of
from amalgam.server.service import Service
from tests.server.conftest import running, wait_until
from tests.server.fakes import FakeDeployment, FakeEngine, encode, fake_settings
from tests.server.test_lifecycle import Start, generate, is_ready, start

__all__ = ["start"]  # a fixture

QUEUE = 8
ANSWER_SECONDS = 2.0


class QueueingEngine(FakeEngine):
    """Whose requests all count as waiting."""

    def status(self) -> Any:
        self.num_waiting = len(self.running)
        return replace(super().status(), num_running=0)


@dataclass
class Stand:
    service: Service
    deployment: FakeDeployment
    url: str

    @property
    def engine(self) -> FakeEngine:
        return self.deployment.engine

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None))


@pytest.fixture
def stand() -> Iterator[Stand]:
    settings = fake_settings(port=0).replace(engine={"max_queue": QUEUE - 1}, inference={"max_batch_size": 1})
    deployment = FakeDeployment(QueueingEngine(max_queue=10**6))
    service = Service(settings, lambda: deployment)
    listeners = listen(settings.server)
    with running(DrainingServer(create_app(service), service), listeners):
        stand = Stand(service, deployment, url_of(listeners[0], ""))
        wait_until(lambda: is_ready(stand.url))
        yield stand


@pytest.mark.parametrize("streams", [False, True])
def test_ten_times_the_queue(stand: Stand, streams: bool) -> None:
    """As many as the queue holds are admitted; the rest is told at once to come again, and not tokenized."""
    tokenized = []

    def counted(text: str) -> list[int]:
        tokenized.append(text)
        return encode(text)

    stand.deployment.encode = counted
    stand.engine.held_at = 1

    async def ask(client: httpx.AsyncClient) -> httpx.Response:
        response = await client.post("/generate", json={"prompt": "a", "max_new_tokens": 3, "stream": streams})
        if response.status_code == 503:
            refused.append(time.monotonic() - began)
            if len(refused) == 9 * QUEUE:
                stand.engine.held_at = None
        return response

    async def run() -> list[httpx.Response]:
        async with stand.client() as client:
            return await asyncio.gather(*(ask(client) for _ in range(10 * QUEUE)))

    refused: list[float] = []
    began = time.monotonic()
    responses = asyncio.run(run())
    assert [response.status_code for response in responses].count(200) == QUEUE
    assert len(refused) == 9 * QUEUE
    for response in responses:
        if response.status_code == 503:
            assert response.json()["error"]["type"] == "overloaded"
            assert response.headers["retry-after"] == "1"
    assert len(tokenized) == QUEUE
    assert generate(stand.url, max_new_tokens=1).status_code == 200


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 – the server is in another thread
        await asyncio.sleep(0.001)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("held_at", [0, 2], ids=["mid-prompt", "mid-answer"])
@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_clients_that_leave_leave_nothing(stand: Stand, streams: bool, held_at: int) -> None:
    stand.engine.held_at = held_at

    async def leave(client: httpx.AsyncClient) -> None:
        body = {"prompt": "a", "max_new_tokens": 50, "stream": streams}
        task = asyncio.create_task(client.post("/generate", json=body))
        await until(lambda: bool(stand.engine.running) or task.done())
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def run(count: int) -> None:
        async with stand.client() as client:
            for _ in range(count):
                await leave(client)
                await until(lambda: not stand.engine.running)

    asyncio.run(run(3))
    wait_until(lambda: stand.service.num_active == 0)
    gc.collect()
    before = num_descriptors()
    asyncio.run(run(50))
    wait_until(lambda: not stand.engine.running and stand.service.num_active == 0)
    wait_until(lambda: num_descriptors() <= before + 1)
    assert stand.engine.num_submitted == 53
    stand.engine.held_at = None
    assert generate(stand.url, max_new_tokens=1).status_code == 200


def test_whoever_waits_for_an_engine_that_dies_is_told(stand: Stand) -> None:
    stand.engine.held_at = 1

    async def run() -> list[httpx.Response]:
        async with stand.client() as client:
            tasks = [
                asyncio.create_task(client.post("/generate", json={"prompt": "a", "stream": index % 2 == 0}))
                for index in range(QUEUE)
            ]
            await until(lambda: len(stand.engine.running) == QUEUE)
            stand.engine.is_alive = False
            health = await client.get("/health")
            assert (health.status_code, (await client.get("/ready")).status_code) == (503, 503)
            return await asyncio.wait_for(asyncio.gather(*tasks), ANSWER_SECONDS * 10)

    for index, response in enumerate(asyncio.run(run())):
        if index % 2 == 0:
            assert response.status_code == 200
            *_, error, done = response.text.strip().split("\n\n")
            assert '"unavailable"' in error and done == "data: [DONE]"
        else:
            assert response.status_code == 503 and "retry-after" in response.headers


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_log_that_cannot_be_written_stops_nobody(start: Start, tmp_path: Path, kind: str) -> None:
    if kind == "full":
        log = Path("/dev/full")
        if not log.exists():
            pytest.skip("this system has no full device")
        server = start(log=log)
    else:
        log = tmp_path / "pipe"
        os.mkfifo(log)
        reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
        try:
            server = start(log=log)
        finally:
            os.close(reader)
    wait_until(lambda: is_ready(server.url))
    for streams in (False, True):
        response = generate(server.url, max_new_tokens=3, stream=streams)
        assert response.status_code == 200
        assert response.text.endswith("data: [DONE]\n\n") is streams
    assert httpx.get(server.url + "/nowhere", timeout=60).status_code == 404
    server.signal()
    assert server.wait() == 0
