"""What a caller may have in a minute, and how much and how slowly a client may send."""

from __future__ import annotations

import itertools
import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from amalgam.server.http.heads import MAX_HEADERS
from amalgam.server.http.limits import RateLimits, TokenBucket, written
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings

GENERATE = {"prompt": "abcde", "max_new_tokens": 4}  # 9 tokens
JSON = {"Content-Type": "application/json"}


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(RateLimits.__init__, "__defaults__", (clock,))
    return clock


def post(path: str, body: str) -> bytes:
    """A request as it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@contextmanager
def server(deployment: FakeDeployment | None = None, **settings: Any) -> Iterator[httpx.Client]:
    deployment = deployment or FakeDeployment()
    with serving(fake_settings(port=0, **settings), lambda: deployment) as url:
        wait_until_ready(url)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


def test_a_bucket_fills_in_a_minute_whatever_the_wall_clock_does() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    bucket.take(90)
    assert bucket.level() == -30
    assert bucket.seconds_until(1) == 31
    clock.time += 31
    assert bucket.level() == 1
    clock.time -= 500  # a clock that is not steady takes nothing away
    assert bucket.level() == 1
    clock.time += 1000
    assert bucket.level() == 60


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.12, "120ms"), (6.5, "6.5s"), (59.9999, "1m0s"), (360, "6m0s"), (61.5, "1m1.5s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert written(seconds) == text


def test_requests_above_the_limit_are_refused_and_not_tokenized(clock: Clock) -> None:
    deployment = FakeDeployment()
    with server(deployment, requests_per_minute=2) as client:
        remaining = []
        for _ in range(2):
            response = client.post("/generate", json=GENERATE)
            assert response.status_code == 200
            remaining.append(response.headers["x-ratelimit-remaining-requests"])
        assert remaining == ["1", "0"]
        assert response.headers["x-ratelimit-limit-requests"] == "2"
        assert response.headers["x-ratelimit-reset-requests"] == "1m0s"
        deployment.encode = lambda text: pytest.fail("tokenized")
        for body in (b'{"prompt": "a"}', b"nonsense", b"x" * 9 * 2**20):
            refused = client.post("/generate", content=body, headers=JSON)
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limited")
            assert refused.headers["retry-after"] == "30"
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert client.get("/model_info").status_code == 200  # costs nothing
        deployment.encode = FakeDeployment.encode
        clock.time += 30
        assert client.post("/generate", json=GENERATE).status_code == 200
        assert client.post("/generate", json=GENERATE).status_code == 429


def test_tokens_are_counted_as_they_are_used_and_debts_are_paid(clock: Clock) -> None:
    with server(tokens_per_minute=10) as client:
        response = client.post("/generate", json=GENERATE)
        assert response.headers["x-ratelimit-limit-tokens"] == "10"
        text = client.post("/generate", json={**GENERATE, "stream": True}).text  # there is one left
        assert text.endswith("data: [DONE]\n\n")
        refused = client.post("/generate", json=GENERATE)
        assert refused.status_code == 429
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        assert refused.headers["retry-after"] == "54"  # 8 tokens of debt and one to begin with
        clock.time += 54
        assert client.post("/generate", json=GENERATE).status_code == 200


def test_embeddings_that_wait_for_room_are_charged_once(clock: Clock) -> None:
    deployment = FakeDeployment()
    deployment.engine.max_queue, deployment.engine.step_seconds = 1, 0.2  # each waits for the one before it
    with server(deployment, tokens_per_minute=100) as client:
        answer = client.post("/v1/embeddings", json={"input": ["abc", "de", "fghi"]})
        assert answer.status_code == 200, answer.text
        assert [item["embedding"][0] > 0 for item in answer.json()["data"]] == [True] * 3
        assert deployment.engine.max_running == 1
        refused = client.post("/v1/embeddings", json={"input": "x" * 999})
        assert refused.headers["x-ratelimit-remaining-tokens"] == "91"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": ["a" * 20, "b" * 20]}),
        ("/v1/completions", {"model": "fake", "prompt": ["a" * 20, "b" * 20]}),
        ("/v1/completions", {"model": "fake", "prompt": ["a" * 20, "b" * 20], "n": 2, "stream": True}),
        ("/batch_generate", {"prompts": ["a" * 20, "b" * 20]}),
    ],
)
def test_what_was_not_computed_of_a_client_s_prompts_that_has_left_is_not_charged(
    clock: Clock, path: str, body: dict[str, Any]
) -> None:
    deployment = FakeDeployment()
    engine = deployment.engine
    engine.held_at, engine.max_step_tokens = 0, 7
    num_requests = 2 * body.get("n", 1)
    with server(deployment, tokens_per_minute=100) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=60) as leaving:
            leaving.sendall(post(path, json.dumps(body)))
            wait_until(lambda: len(engine.running) == num_requests)
        wait_until(lambda: not engine.running)
        refused = client.post("/v1/embeddings", json={"input": "x" * 999})
        assert refused.headers["x-ratelimit-remaining-tokens"] == "86"


def test_each_key_has_its_own_limits(clock: Clock, tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text("- {name: a, key: key-a}\n- {name: b, key: key-b, requests_per_minute: 3}")
    with server(requests_per_minute=1, api_keys_file=str(file), admin_key="root") as client:
        counts = {
            key: sum(
                client.post("/generate", json=GENERATE, headers={"x-api-key": key}).status_code == 200 for _ in range(5)
            )
            for key in ("key-a", "key-b", "root")
        }
    assert counts == {"key-a": 1, "key-b": 3, "root": 5}


def test_without_limits_there_are_no_headers_of_them(client: httpx.Client) -> None:
    response = client.post("/generate", json=GENERATE)
    assert not any(name.startswith("x-ratelimit") for name in response.headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Long": "a" * 5000},
        {f"X-{index}": "a" for index in range(MAX_HEADERS)},
        {"Authorization": "Bearer " + "a" * 5000},
    ],
)
def test_long_heads_are_refused(headers: dict[str, str]) -> None:
    with server(max_header_bytes=4096) as client:
        response = client.post("/generate", json=GENERATE, headers=headers)
        assert (response.status_code, response.json()["error"]["type"]) == (431, "headers_too_large")
        assert client.get("/health", params={"a": "x" * 5000}).status_code == 431
        assert client.post("/generate", json=GENERATE).status_code == 200


def test_a_long_head_is_refused_as_one_however_it_arrives(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amalgam.server")
    with server(max_header_bytes=4096) as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 6000)  # and no end
            head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    first, *headers = head.decode().lower().split("\r\n")
    assert first == "http/1.1 431 request header fields too large"
    error = json.loads(body)["error"]
    assert error["type"] == "headers_too_large" and "4096" in error["message"]
    [request_id] = [line.partition(": ")[2] for line in headers if line.startswith("x-request-id: ")]
    [line] = [record.getMessage() for record in caplog.records if request_id in record.getMessage()]
    assert line.startswith("- - 431 ") and line.endswith("error=headers_too_large")


def test_what_is_no_http_has_its_line_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amalgam.server")
    with server() as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(b"nonsense\r\n\r\n")
            answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n") and b"x-request-id: " in answer
    assert [record for record in caplog.records if record.getMessage().startswith("- - 400 ")]


def test_a_body_that_comes_slowly_is_refused_and_its_connection_closed() -> None:
    with server(body_seconds=0.2) as client:
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=60) as slow:
            slow.sendall(b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 1000\r\n\r\n{")
            answer = b""
            started = time.monotonic()
            slow.setblocking(False)
            for _ in itertools.count():  # a byte now and then keeps nothing open
                assert time.monotonic() < started + 60
                try:
                    slow.send(b" ")
                    if not (received := slow.recv(65536)):
                        break
                    answer += received
                except BlockingIOError:
                    pass
                except (BrokenPipeError, ConnectionResetError):
                    break
                time.sleep(0.02)
        assert b" 408 " in answer.partition(b"\r\n")[0]
        assert b"body_timeout" in answer
        wait_until(lambda: client.post("/generate", json=GENERATE).status_code == 200)  # sooner or later in time


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_has_its_time_and_no_more(stream: bool) -> None:
    deployment = FakeDeployment()
    deployment.engine.held_at = 2
    with server(deployment, request_seconds=1.0) as client:
        response = client.post("/generate", json={**GENERATE, "stream": stream})
        assert response.status_code == (200 if stream else 504)
        assert '"type":"timed_out"' in response.text
        assert response.text.endswith("data: [DONE]\n\n") is stream
        wait_until(lambda: not deployment.engine.running)
        counted = 'amalgam_requests_refused_total{reason="timed_out"} 1'
        wait_until(lambda: counted in client.get("/metrics").text)
        deployment.engine.held_at = None
        wait_until(lambda: client.post("/generate", json=GENERATE).status_code == 200)  # sooner or later in time
