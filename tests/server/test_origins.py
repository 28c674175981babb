"""What a web page in the operator's browser can do to a server on this machine: nothing, unless it is allowed to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from amalgam.config.settings import build_settings
from amalgam.errors import ConfigError
from amalgam.server.http.origins import is_loopback
from tests.errors import raises
from tests.server.conftest import serving, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings

EVIL, FRIEND = "https://evil.example", "https://friend.example:8443"
PATHS = ("/", "/health", "/ready", "/metrics", "/docs", "/dashboard", "/serving", "/model_info", "/dashboard/events")
CHANGES = ("/generate", "/reload_weights", "/update_weight_mapping", "/reset_expert_stats", "/export_expert_stats")


@contextmanager
def server(**settings: Any) -> Iterator[httpx.Client]:
    with serving(fake_settings(port=0, **settings), FakeDeployment) as url:
        wait_until_ready(url)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


@pytest.fixture(scope="module")
def allowing() -> Iterator[httpx.Client]:
    with server(allowed_hosts="dash.example, *.corp.example", allowed_origins=[FRIEND]) as client:
        yield client


def refusal(response: httpx.Response, *parts: str) -> str:
    assert response.status_code == 403
    error: dict[str, str] = response.json()["error"]
    for part in parts:
        assert part in error["message"]
    return error["type"]


@pytest.mark.parametrize("path", PATHS)
def test_a_name_that_was_made_to_point_here_reads_nothing(shared_client: httpx.Client, path: str) -> None:
    response = shared_client.get(path, headers={"Host": "rebound.example:8080"})
    assert refusal(response, "rebound.example", "server.allowed_hosts") == "foreign_host"


@pytest.mark.parametrize(
    "host", ["rebound.example", "localhost.evil.example", "10.1.2.3", "[2001:db8::1]:80", "127.0.0.1.evil.example"]
)
def test_foreign_hosts(shared_client: httpx.Client, host: str) -> None:
    assert refusal(shared_client.post("/reload_weights", headers={"Host": host})) == "foreign_host"


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:1", "localhost.", "127.0.0.1:9", "127.9.9.9", "[::1]:80", "[::1]"]
)
def test_names_of_this_machine(shared_client: httpx.Client, host: str) -> None:
    assert shared_client.get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "origin", [EVIL, "null", "http://localhost:3000", "http://127.0.0.1", "file://", "x", "http://[", ""]
)
@pytest.mark.parametrize("path", CHANGES)
def test_foreign_pages_change_nothing(shared_client: httpx.Client, origin: str, path: str) -> None:
    for headers in ({}, {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}):
        response = shared_client.post(path, content=b"{}", headers={"Origin": origin, **headers})
        assert refusal(response, repr(origin), "server.allowed_origins") == "foreign_origin"
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("path", PATHS)
def test_foreign_pages_read_nothing(shared_client: httpx.Client, path: str) -> None:
    assert refusal(shared_client.get(path, headers={"Origin": EVIL})) == "foreign_origin"
    sign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert refusal(shared_client.get(path, headers=sign)) == "foreign_origin"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://localhost/health", 200),
        (b"HTTP://127.0.0.1:8080/health?a=b", 200),
        (b"http://localhost", 200),
        (b"http://rebound.example/weights", 403),
        (b"http://localhost/nowhere", 404),
    ],
)
def test_a_target_may_name_the_host_which_then_counts(shared_client: httpx.Client, target: bytes, status: int) -> None:
    for host in ("localhost", "other.example"):
        answer = shared_client.get("/", headers={"Host": host}, extensions={"target": target})
        assert answer.status_code == status


def test_what_is_refused_is_counted(shared_client: httpx.Client) -> None:
    def count(reason: str) -> float:
        [line] = [
            x for x in shared_client.get("/metrics").text.splitlines() if f'refused_total{{reason="{reason}"}}' in x
        ]
        return float(line.rpartition(" ")[2])

    before = [count(reason) for reason in ("foreign_host", "foreign_origin")]
    shared_client.get("/", headers={"Host": "rebound.example"})
    shared_client.get("/", headers={"Origin": EVIL})
    assert [count(reason) for reason in ("foreign_host", "foreign_origin")] == [number + 1 for number in before]


def test_a_form_of_a_foreign_page_without_an_origin(shared_client: httpx.Client) -> None:
    sign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert refusal(shared_client.post("/reset_expert_stats", headers=sign)) == "foreign_origin"
    assert shared_client.get("/health", headers=sign).status_code == 200  # a link, as from a page of notes


def test_preflights_of_foreign_pages_are_refused(shared_client: httpx.Client) -> None:
    headers = {"Origin": EVIL, "Access-Control-Request-Method": "POST"}
    response = shared_client.options("/generate", headers=headers)
    assert refusal(response) == "foreign_origin"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_the_own_page_and_programs(shared_client: httpx.Client, site: str) -> None:
    body = {"prompt": "a", "max_new_tokens": 1}
    own = str(shared_client.base_url).rstrip("/")
    for headers in ({}, {"Origin": own, "Sec-Fetch-Site": site}, {"Sec-Fetch-Site": site}):
        assert shared_client.post("/generate", json=body, headers=headers).status_code == 200
    # Through a tunnel the port is another one.
    tunnel = {"Host": "localhost:9999", "Origin": "http://localhost:9999"}
    assert shared_client.post("/generate", json=body, headers=tunnel).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("dash.example", "https://dash.example"),
        ("Dash.Example:443", "https://dash.example"),
        ("a.corp.example", "http://a.corp.example"),
    ],
)
def test_a_proxy_with_a_configured_name(allowing: httpx.Client, host: str, origin: str) -> None:
    headers = {"Host": host, "Origin": origin}
    assert allowing.post("/generate", json={"prompt": "a", "max_new_tokens": 1}, headers=headers).status_code == 200
    assert allowing.get("/dashboard", headers={"Host": host}).status_code == 200
    assert refusal(allowing.get("/", headers={"Host": "corp.example"})) == "foreign_host"
    assert refusal(allowing.get("/", headers={**headers, "Origin": "https://dash.example:444"})) == "foreign_origin"


def test_an_allowed_page(allowing: httpx.Client) -> None:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-key"}
    preflight = allowing.options("/generate", headers={"Origin": FRIEND, **asked})
    assert (preflight.status_code, preflight.content) == (204, b"")
    assert preflight.headers["access-control-allow-origin"] == FRIEND
    assert preflight.headers["access-control-allow-headers"] == "content-type,x-key"
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for body, status in (({"prompt": "a", "max_new_tokens": 1}, 200), ({}, 422)):
        response = allowing.post("/generate", json=body, headers={"Origin": FRIEND, "Sec-Fetch-Site": "cross-site"})
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == FRIEND  # errors can be read, too
        assert "Origin" in response.headers["vary"]
    assert refusal(allowing.get("/", headers={"Origin": EVIL})) == "foreign_origin"


def test_everybody_may_be_allowed() -> None:
    with server(allowed_hosts=["*"], allowed_origins=["*"]) as client:
        headers = {"Host": "any.example", "Origin": EVIL}
        response = client.get("/", headers=headers)
        assert (response.status_code, response.headers["access-control-allow-origin"]) == (200, EVIL)


LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]", "127.8.8.8")


@pytest.mark.parametrize("host", [*LOCAL, "0.0.0.0", "::", "", "192.0.2.1", "no such name"])
def test_only_loopback_addresses_are_private(host: str) -> None:
    assert is_loopback(host) is (host in LOCAL)


@pytest.mark.parametrize("host", ["gpu7.lan", "10.0.0.7:8080"])
def test_a_server_for_others_has_names_that_it_cannot_know(host: str) -> None:
    for settings in ({}, {"allowed_hosts": ["gpu7.lan"]}):
        with server(host="0.0.0.0", **settings) as client:
            assert client.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("allowed_origins", "friend.example"),
        ("allowed_origins", "https://friend.example/page"),
        ("allowed_hosts", "https://friend.example"),
        ("allowed_hosts", "a b"),
        ("allowed_hosts", "*evil"),
    ],
)
def test_what_no_header_can_be_is_refused(key: str, value: str) -> None:
    with raises(ConfigError, f"server.{key}"):
        build_settings({"model": {"base_path": "fake"}, "server": {key: value}})
