"""Prompts of megabytes beside small ones: turns, clients that leave, memory that is bounded."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from amalgam.errors import PromptTooLongError, RequestError
from amalgam.server.api.openai.prompts import PromptLimit, encode_prompts
from amalgam.server.encoding import Encoder
from amalgam.server.http import body
from amalgam.server.service import Service
from amalgam.text.pieces import PIECE_CHARS
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings

LONG = "a" * (20 * PIECE_CHARS)


class SlowTokenizer:
    """A piece of a long prompt takes a token and a permit; a short prompt takes none."""

    def __init__(self) -> None:
        self.permits = threading.Semaphore(0)
        self.lock = threading.Lock()
        self.num_pieces = self.num_running = self.max_running = 0

    def encode_by_piece(self, text: str, max_tokens: int) -> Iterator[list[int]]:
        if text == "bad":
            raise RequestError("bad")
        for _ in range(max(1, len(text) // PIECE_CHARS)):
            with self.lock:
                self.num_running += 1
                self.max_running = max(self.max_running, self.num_running)
            if len(text) > PIECE_CHARS:
                assert self.permits.acquire(timeout=60)
            with self.lock:
                self.num_running -= 1
                self.num_pieces += 1
            yield [1]


def test_a_short_prompt_waits_for_a_turn_and_not_for_a_prompt() -> None:
    tokenizer: Any = SlowTokenizer()

    async def run() -> None:
        encoder = Encoder(2)
        long = [asyncio.create_task(encoder.encode(tokenizer, [LONG], 100)) for _ in range(8)]
        await asyncio.sleep(0)
        short = asyncio.create_task(encoder.encode(tokenizer, ["a"], 100))
        for _ in range(8):
            tokenizer.permits.release()
        assert await asyncio.wait_for(short, 60) == [[1]]
        assert not any(task.done() for task in long)
        assert tokenizer.num_pieces <= 8 + 1
        for task in long:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
        for _ in range(10):
            tokenizer.permits.release()
        assert await asyncio.wait_for(encoder.encode(tokenizer, ["a"] * 3, 100), 60) == [[1]] * 3

    asyncio.run(run())
    assert tokenizer.max_running <= 2
    assert tokenizer.num_pieces < 30  # of 160


def test_a_turn_that_goes_on_after_its_client_has_left_is_still_one() -> None:
    tokenizer: Any = SlowTokenizer()

    async def run() -> None:
        encoder = Encoder(1)
        for _ in range(5):
            task = asyncio.create_task(encoder.encode(tokenizer, [LONG], 100))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        tokenizer.permits.release()
        assert await asyncio.wait_for(encoder.encode(tokenizer, ["a"], 100), 60) == [[1]]

    asyncio.run(run())
    assert (tokenizer.max_running, tokenizer.num_pieces) == (1, 2)


def test_a_thread_that_cannot_be_started_takes_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def run() -> None:
        encoder, tokenizer = Encoder(1), SlowTokenizer()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(threading.Thread, "start", no_thread)
            await encoder.encode(tokenizer, ["a"], 100)  # type: ignore[arg-type]
        assert await asyncio.wait_for(encoder.encode(tokenizer, ["a"], 100), 60) == [[1]]  # type: ignore[arg-type]

    asyncio.run(run())


def test_the_prompt_that_cannot_be_encoded_is_named() -> None:
    tokenizer: Any = SlowTokenizer()
    with pytest.raises(RequestError) as caught:
        asyncio.run(Encoder(1).encode(tokenizer, ["a", "bad"], 100))
    assert caught.value.__notes__ == ["This is prompts[1]"]


def test_clients_that_left_are_not_tokenized(
    url: str, deployment: FakeDeployment, caplog: pytest.LogCaptureFixture
) -> None:
    """Four turns are taken; what waits for one and leaves is never looked at."""
    caplog.set_level(logging.INFO, "amalgam.server")
    held, seen = threading.Event(), []

    def encode(text: str) -> list[int]:
        seen.append(text)
        assert held.wait(60)
        return [1]

    deployment.encode = encode
    with httpx.Client(base_url=url, timeout=60) as client:
        threads = [
            threading.Thread(target=client.post, args=("/generate",), kwargs={"json": {"prompt": "first"}})
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(seen) == 4)
        for _ in range(5):
            with pytest.raises(httpx.ReadTimeout):
                client.post("/generate", json={"prompt": "left"}, timeout=httpx.Timeout(60, read=0.05))
        wait_until(lambda: caplog.text.count("/generate 499") == 5)
        held.set()
        for thread in threads:
            thread.join()
        assert client.post("/generate", json={"prompt": "last", "max_new_tokens": 1}).status_code == 200
    assert seen == ["first"] * 4 + ["last"]


def test_long_bodies_become_text_a_few_at_a_time(
    url: str, deployment: FakeDeployment, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "INLINE_BODY_BYTES", 1000)
    monkeypatch.setattr(body, "LONG_BODY_BYTES", 1000)
    caplog.set_level(logging.INFO, "amalgam.server")
    held, seen = threading.Event(), []

    def encode(text: str) -> list[int]:
        seen.append(text[:4])
        assert len(text) < 1000 or held.wait(60)
        return [1]

    deployment.encode = encode
    parsed = []
    monkeypatch.setattr(body, "parse_body", lambda raw, parse=body.parse_body: parsed.append(raw[:15]) or parse(raw))
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(3) as pool:
        request = {"prompt": "long" * 500, "max_new_tokens": 1}
        answers = [pool.submit(client.post, "/generate", json=request) for _ in range(2)]
        wait_until(lambda: len(seen) == 2)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/generate", json={"prompt": "left" * 500}, timeout=httpx.Timeout(60, read=0.05))
        wait_until(lambda: "/generate 499" in caplog.text)
        answers.append(pool.submit(client.post, "/generate", json=request))
        assert client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).status_code == 200
        assert len(parsed) == 3
        held.set()
        assert [answer.result().status_code for answer in answers] == [200] * 3
        too_long = {"prompt": "a", "unknown": "x" * 2000}
        assert [client.post("/generate", json=too_long).status_code for _ in range(5)] == [422] * 5
    assert "left" not in seen


@pytest.mark.parametrize("path", ["/generate", "/batch_generate", "/dashboard/chat", "/experts/trace"])
def test_every_way_in_knows_the_limit(client: httpx.Client, deployment: FakeDeployment, path: str) -> None:
    seen = []

    def by_piece(prompt: object, limit: int, **options: object) -> Iterator[list[int]]:
        seen.append(limit)
        raise PromptTooLongError("too long")
        yield []

    deployment.tokenizer_override = SimpleNamespace(encode_by_piece=by_piece, encode_chat_by_piece=by_piece)
    bodies: dict[str, Any] = {
        "/generate": {"prompt": "a"},
        "/batch_generate": {"prompts": ["a"]},
        "/dashboard/chat": {"messages": [{"role": "user", "content": "a"}]},
        "/experts/trace": {"text": "a"},
    }
    assert client.post(path, json=bodies[path]).status_code == 413
    assert seen == [deployment.engine.max_prompt_tokens]


def test_bodies_that_are_held_are_bounded_together(deployment: FakeDeployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "MAX_HELD_BODIES", 2)
    deployment.engine.held_at = 0
    with serving(fake_settings(port=0, max_body_bytes=1024), lambda: deployment) as url:
        wait_until_ready(url)
        request = {"prompt": "a" * 40, "stop": ["b" * 800], "stream": True, "max_new_tokens": 1}
        with httpx.Client(base_url=url, timeout=60) as client:
            with client.stream("POST", "/generate", json=request), client.stream("POST", "/generate", json=request):
                wait_until(lambda: len(deployment.engine.running) == 2)
                refused = client.post("/generate", json=request)
                assert (refused.status_code, refused.json()["error"]["type"]) == (503, "overloaded")
                assert "retry-after" in refused.headers
                assert client.get("/health").status_code == 200
                assert client.post("/reload_weights").status_code == 200
            wait_until(lambda: not deployment.engine.running)
            deployment.engine.held_at = None
            assert client.post("/generate", json=request).status_code == 200


def test_many_token_ids_are_not_checked_by_the_event_loop() -> None:
    read_by: list[int] = []

    class Watched(list[int]):
        def __iter__(self) -> Iterator[int]:
            read_by.append(threading.get_ident())
            return super().__iter__()

    service = Service(fake_settings(port=0), FakeDeployment)
    service.start()
    wait_until(lambda: service.has_loaded)
    prompts = [Watched([1, 2, 3]), Watched([4])]
    encoded = asyncio.run(encode_prompts(service, "input", prompts, PromptLimit(2)))
    assert encoded.token_ids == [[1, 2, 3], [4]]
    assert len(read_by) == 2 and threading.get_ident() not in read_by


def test_a_request_s_latencies_begin_before_it_is_encoded(client: httpx.Client, deployment: FakeDeployment) -> None:
    encoded: list[float] = []
    deployment.encode = lambda text: encoded.append(time.monotonic()) or [1]
    bodies = {"/generate": {"prompt": "a"}, "/v1/embeddings": {"input": "a"}, "/v1/completions": {"prompt": "a"}}
    for path, fields in bodies.items():
        assert client.post(path, json=fields).status_code == 200
    arrived = [observation.arrived_at for observation in deployment.engine.observations]
    assert len(arrived) == len(encoded) == 3
    assert all(before is not None and before <= then for before, then in zip(arrived, encoded, strict=True))
