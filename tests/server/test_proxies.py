"""What a proxy, a balancer or a browser in front expects of HTTP."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from typing import Any

import httpx
import pytest

from amalgam.config.settings import build_settings
from amalgam.errors import ConfigError
from amalgam.server.http.accept import prefers_html
from amalgam.server.http.lifecycle import listen, url_of
from tests.errors import raises
from tests.server.conftest import serving, wait_until, wait_until_ready
from tests.server.fakes import MAX_SEQ_LENGTH, FakeDeployment, fake_settings

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"
PAGES = ("/", "/health", "/ready", "/metrics", "/dashboard", "/docs", "/openapi.json", "/model_info", "/serving")


def test_a_stream_answers_at_once_and_says_that_it_lives(deployment: FakeDeployment) -> None:
    deployment.engine.held_at = 0
    with serving(fake_settings(port=0, stream_comment_seconds=0.02), lambda: deployment) as url:
        wait_until_ready(url)
        body = {"prompt": "a", "stream": True, "max_new_tokens": 2}
        with httpx.stream("POST", url + "/generate", json=body, timeout=60) as response:
            assert response.status_code == 200
            lines = (line for line in response.iter_lines() if line)
            assert [next(lines) for _ in range(3)] == [": keep-alive"] * 3
            deployment.engine.held_at = None
            rest = [line for line in lines if not line.startswith(":")]
    assert json.loads(rest[0].removeprefix("data: ")) == {"text": "w0 ", "generated_tokens": 1}
    assert rest[-1] == "data: [DONE]"


def test_comments_can_be_left_out(deployment: FakeDeployment) -> None:
    deployment.engine.step_seconds = 0.05
    with serving(fake_settings(port=0, stream_comment_seconds=0), lambda: deployment) as url:
        wait_until_ready(url)
        body = {"prompt": "a", "stream": True, "max_new_tokens": 3}
        assert ": " not in [line[:2] for line in httpx.post(url + "/generate", json=body, timeout=60).text.splitlines()]


@pytest.mark.parametrize(
    ("fields", "status"), [({"prompt": "x" * MAX_SEQ_LENGTH}, 413), ({"prompt": ""}, 422), ({"top_p": 2}, 422)]
)
def test_what_is_wrong_before_the_queue_has_its_status(
    shared_client: httpx.Client, fields: dict[str, Any], status: int
) -> None:
    response = shared_client.post("/generate", json={"prompt": "a", "stream": True, **fields})
    assert response.status_code == status
    assert response.json()["error"]["type"]


def test_a_full_queue_has_its_status(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.engine.max_queue = 0
    assert client.post("/generate", json={"prompt": "a", "stream": True}).status_code == 503


def test_a_client_that_leaves_before_the_first_token_frees_its_place(url: str, deployment: FakeDeployment) -> None:
    deployment.engine.held_at = 0
    with httpx.stream("POST", url + "/generate", json={"prompt": "a", "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        wait_until(lambda: len(deployment.engine.running) == 1)
    wait_until(lambda: not deployment.engine.running)


def test_head_is_get_without_the_body(shared_client: httpx.Client) -> None:
    described = shared_client.get("/openapi.json").json()["paths"]
    paths = {path for path, methods in described.items() if "get" in methods}
    assert len(paths) > 30
    for path in sorted(paths | set(PAGES) | {"/dashboard/events", "/dashboard/static/page.css"}):
        head = shared_client.head(path)
        assert head.content == b"", path
        with shared_client.stream("GET", path) as get:
            assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])
            if "content-length" in get.headers and path not in ("/", "/metrics", "/serving"):  # their times differ
                assert head.headers["content-length"] == get.headers["content-length"], path
        assert shared_client.get("/health").status_code == 200  # on the same connection


def test_head_of_what_is_no_page(shared_client: httpx.Client) -> None:
    assert shared_client.head("/nowhere").status_code == 404
    assert shared_client.head("/generate").status_code == 405


@pytest.mark.parametrize("path", [path for path in PAGES if path != "/"])
@pytest.mark.parametrize("end", ["/", "/?x=1"])
def test_a_slash_at_the_end_leads_to_the_page(shared_client: httpx.Client, path: str, end: str) -> None:
    for prefix in ("", "/prefix"):  # that a proxy takes away; the redirect must hold for what the browser sees
        response = shared_client.get(path + end)
        assert response.status_code == 308
        place = httpx.URL("http://front" + prefix + path + end).join(response.headers["location"])
        assert (place.path, place.query) == (prefix + path, b"x=1" if "?" in end else b"")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/metrics", "/dashboard", "/docs", "/openapi.json"])
def test_pages_and_probes_pass_over_queries(shared_client: httpx.Client, path: str) -> None:
    assert shared_client.get(path + "?utm_source=x&a=1&a=2&_=3").status_code == 200


@pytest.mark.parametrize(
    ("accept", "is_browser"),
    [
        (BROWSER, True),
        ("text/html", True),
        ("text/html;q=0.5, application/json;q=0.4", True),
        ("*/*", False),
        ("", False),
        ("application/json", False),
        ("application/json, text/html", False),
        ("text/html;q=0, */*", False),
        ("text/html;q=x", False),
    ],
)
def test_a_browser_gets_the_page(shared_client: httpx.Client, accept: str, is_browser: bool) -> None:
    assert prefers_html(accept) is is_browser
    response = shared_client.get("/", headers={"Accept": accept})
    assert "Accept" in response.headers["vary"].split(", ")
    if is_browser:
        assert response.headers["content-type"].startswith("text/html")
    else:
        assert response.json()["status"] == "healthy"


def exchange(connection: socket.socket) -> bytes:
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while b"}" not in answer and (received := connection.recv(65536)):
        answer += received
    return answer


def test_connections_live_for_as_long_as_the_setting_says() -> None:
    assert fake_settings().server.keep_alive_seconds == 75
    with serving(fake_settings(port=0, keep_alive_seconds=0.5), FakeDeployment) as url:
        address = (httpx.URL(url).host, httpx.URL(url).port)
        while True:  # until a first request is in time
            with socket.create_connection(address, timeout=60) as used, suppress(ConnectionError):
                if b" 200 " in exchange(used):
                    assert used.recv(1) == b""
                    break
        with socket.create_connection(address, timeout=60) as silent:
            assert silent.recv(1) == b""
        with socket.create_connection(address, timeout=60) as slow:  # a byte now and then keeps nothing open
            started = time.monotonic()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                while time.monotonic() < started + 60:
                    slow.sendall(b"G")
                    time.sleep(0.02)
    with serving(fake_settings(port=0), FakeDeployment) as url:
        address = (httpx.URL(url).host, httpx.URL(url).port)
        with socket.create_connection(address, timeout=60) as connection:
            assert b" 200 " in exchange(connection)
            time.sleep(0.3)
            assert b" 200 " in exchange(connection)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@needs_ipv6
@pytest.mark.parametrize(
    ("host", "addresses", "shown"),
    [
        ("localhost", ["127.0.0.1", "::1"], "http://localhost:"),
        ("::", ["127.0.0.1", "::1"], "http://[::1]:"),
        ("::1", ["::1"], "http://[::1]:"),
        ("[::1]", ["::1"], "http://[::1]:"),
        ("0.0.0.0", ["127.0.0.1"], "http://127.0.0.1:"),
    ],
)
def test_every_address_of_a_host_is_listened_on(host: str, addresses: list[str], shown: str) -> None:
    with serving(fake_settings(host=host, port=0), FakeDeployment) as url:
        assert url.startswith(shown)
        for address in addresses:
            name = f"[{address}]" if ":" in address else address
            assert httpx.get(f"http://{name}:{httpx.URL(url).port}/health", timeout=60).status_code == 200


@needs_ipv6
def test_a_port_that_is_taken_at_one_address_is_taken() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as other:
        port = other.getsockname()[1]
        with raises(ConfigError, port):
            listen(fake_settings(host="localhost", port=port).server)


def test_an_address_that_this_machine_has_not() -> None:
    with raises(ConfigError, "192.0.2.1"):
        listen(fake_settings(host="192.0.2.1", port=0).server)


def test_urls_that_can_be_opened() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, "127.0.0.1") == f"http://127.0.0.1:{port}"
        assert url_of(listener, "gpu7.lan") == f"http://gpu7.lan:{port}"


@pytest.mark.parametrize("key", ["keep_alive_seconds", "stream_comment_seconds", "accept_backlog"])
def test_times_have_bounds(key: str) -> None:
    with raises(ConfigError, key):
        build_settings({"model": {"base_path": "fake"}, "server": {key: -1}})
