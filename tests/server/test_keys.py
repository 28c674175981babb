"""Who may ask for what: every endpoint, method, key and name of the host."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from amalgam.config.settings import Settings
from amalgam.errors import ConfigError
from amalgam.server import create_app
from amalgam.server.app import paths_of
from amalgam.server.http.keys import KeyRing, Needs, UnauthorizedError, presented_keys
from amalgam.server.permissions import needs_of
from amalgam.server.service import Service
from tests.errors import raises
from tests.lazy import Lazy
from tests.server.conftest import serving, wait_until_ready
from tests.server.fakes import FakeDeployment, fake_settings

anthropic = Lazy("anthropic")
openai = Lazy("openai")

USER, OTHER, ADMIN = "user-key-1", "user-key-2", "admin-key"
GENERATE = {"prompt": "a", "max_new_tokens": 1}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
PATHS = sorted(set(paths_of(create_app(Service(fake_settings(), FakeDeployment)).routes)))
KEYLESS = {"/", "/health", "/v1/health", "/ping", "/ready", "/version", "/dashboard", "/docs", "/openapi.json"}
KEYLESS |= {"/dashboard/static/{name:path}", "/static/{name:path}"}
CHANGES = [
    "/update_weight_mapping", "/reload_weights", "/reset_expert_stats", "/export_expert_stats", "/experts/sets",
    "/experts/trace", "/dashboard/undo", "/expert_stats",
]  # fmt: skip


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def ready(settings: Settings) -> Iterator[httpx.Client]:
    with serving(settings, FakeDeployment) as url:
        wait_until_ready(url)
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client


@pytest.fixture(scope="module")
def keyed() -> Iterator[httpx.Client]:
    yield from ready(fake_settings(port=0, api_keys=f"{USER},{OTHER}", admin_key=ADMIN))


def test_every_endpoint_is_listed() -> None:
    assert len(PATHS) > 30
    assert [path for path in PATHS if needs_of(path) is None] == []
    assert {path for path in PATHS if needs_of(path) is Needs.NOTHING} >= KEYLESS


BAD_HEADERS: list[dict[str, str]] = [
    {}, {"Authorization": "Bearer"}, bearer("wrong"), bearer(USER.upper()), bearer(f"{USER} {ADMIN}"),
    bearer(USER[:-1]), bearer(f"sha256:{hashlib.sha256(USER.encode()).hexdigest()}"), {"Authorization": USER},
    {"Authorization": f"Basic {USER}"}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"api-key": USER},
    {"Cookie": f"api_key={USER}"},
]  # fmt: skip
HOSTS = ("localhost", "rebound.example")


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(Service(fake_settings(api_keys=f"{USER},{OTHER}", admin_key=ADMIN), FakeDeployment))


@pytest.mark.parametrize("path", PATHS)
def test_no_endpoint_answers_a_bad_key(app: FastAPI, path: str) -> None:
    address = path.replace("{name:path}", "page.css").replace("{", "").replace("}", "")

    async def ask() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for method, headers, host in [
                *itertools.product(METHODS, [{}, bearer("wrong")], HOSTS),
                *itertools.product(("GET", "POST"), BAD_HEADERS, HOSTS[:1]),
            ]:
                response = await client.request(method, address, headers={**headers, "Host": host})
                if host == "rebound.example":
                    assert response.status_code == 403, (method, headers)
                elif path in KEYLESS or needs_of(path) is Needs.NOTHING:
                    assert (response.status_code < 500 and response.status_code != 401) or path == "/ready"
                else:
                    assert response.status_code == 401, (method, headers)
                    assert response.headers["www-authenticate"] == "Bearer"

    asyncio.run(ask())


@pytest.mark.parametrize("path", [path for path in PATHS if needs_of(path) is Needs.ADMIN])
def test_what_needs_the_admin_key_refuses_others(keyed: httpx.Client, path: str) -> None:
    for method, key in itertools.product(("GET", "HEAD", "POST"), (USER, OTHER)):
        response = keyed.request(method, path, headers=bearer(key))
        assert response.status_code == 403
    assert response.json()["error"]["type"] == "forbidden"


@pytest.mark.parametrize("path", CHANGES)
def test_changes_and_others_traffic_need_the_admin_key(path: str) -> None:
    assert needs_of(path) is Needs.ADMIN


@pytest.mark.parametrize("headers", [bearer(USER), {"x-api-key": OTHER}, {"Authorization": f"bearer  {USER}"}])
def test_a_good_key_opens_what_it_should(keyed: httpx.Client, headers: dict[str, str]) -> None:
    assert keyed.post("/generate", json=GENERATE, headers=headers).status_code == 200
    assert keyed.get("/model_info", headers=headers).status_code == 200
    assert keyed.get("/metrics", headers=headers).status_code == 200
    assert keyed.get("/nowhere", headers=headers).status_code == 404
    assert keyed.get("/serving", headers=headers).status_code == 403
    for path in ("/serving", "/remaps", "/model_info"):
        assert keyed.get(path, headers=bearer(ADMIN)).status_code == 200
    assert keyed.post("/reload_weights", headers=bearer(ADMIN)).status_code == 200


def test_nothing_is_read_of_a_request_without_a_key(keyed: httpx.Client) -> None:
    response = keyed.post("/generate", content=b"x" * 9 * 2**20)
    assert (response.status_code, response.json()["error"]["type"]) == (401, "unauthorized")


def test_metrics_may_be_keyless() -> None:
    for client in ready(fake_settings(port=0, api_keys=[USER], keyless_metrics=True)):
        assert client.get("/metrics").status_code == 200
        assert client.get("/model_info").status_code == 401


def test_without_an_admin_key_nobody_changes_a_server_that_has_keys() -> None:
    for client in ready(fake_settings(port=0, api_keys=[USER])):
        response = client.post("/reload_weights", headers=bearer(USER))
        assert response.status_code == 403
        assert "server.admin_key" in response.json()["error"]["message"]


def test_an_admin_key_alone_protects_what_needs_it() -> None:
    for client in ready(fake_settings(port=0, admin_key=ADMIN)):
        assert client.post("/generate", json=GENERATE, headers=bearer("any")).status_code == 200
        assert client.post("/reload_weights").status_code == 401
        assert client.post("/reload_weights", headers=bearer(ADMIN)).status_code == 200


def ring(tmp_path: Path, text: str, **settings: Any) -> KeyRing:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(0o600)
    return KeyRing(fake_settings(api_keys_file=str(file), **settings).server)


def digest(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@pytest.mark.parametrize("text", [f"{USER}\n{OTHER}\n", f"# ours\n{USER}\n{digest(OTHER)}\n", f"[{USER}, {OTHER}]"])
def test_a_file_of_keys(tmp_path: Path, text: str) -> None:
    keys = ring(tmp_path, text)
    names = [caller.name for key in (USER, OTHER) if (caller := keys.find([key.encode()]))]
    assert names == ["file-1", "file-2"]
    assert keys.find([b"wrong", b""]) is None


def test_a_file_with_names_limits_and_an_administrator(tmp_path: Path) -> None:
    text = f"""
- name: alice
  key: {digest(USER)}
  requests_per_minute: 7
- {{name: root, key: {ADMIN}, admin: true}}
"""
    keys = ring(tmp_path, text, requests_per_minute=5, tokens_per_minute=900)
    alice, root = keys.find([USER.encode()]), keys.find([USER.encode(), ADMIN.encode()])
    assert alice is not None and root is not None
    assert (alice.name, alice.requests_per_minute, alice.tokens_per_minute) == ("alice", 7, 900)
    assert (root.name, root.is_admin, root.requests_per_minute, root.tokens_per_minute) == ("root", True, 0, 0)


OWN_PRIORITY = f"""
- {{name: alice, key: {USER}, priority: 5}}
- {{name: bob, key: {OTHER}}}
- {{name: root, key: {ADMIN}, admin: true, priority: 2}}
"""


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_no_key_but_an_administrator_s_passes_others_by(tmp_path: Path, path: str) -> None:
    deployment = FakeDeployment()
    ring(tmp_path, OWN_PRIORITY)
    prompt = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1} if "chat" in path else {"prompt": "a"}
    with serving(fake_settings(port=0, api_keys_file=str(tmp_path / "keys")), lambda: deployment) as url:
        wait_until_ready(url)

        def ask(key: str, **fields: Any) -> httpx.Response:
            return httpx.post(url + path, json={**prompt, **fields}, headers=bearer(key), timeout=60)

        wanted = [
            (USER, {}, 5),
            (USER, {"priority": 3}, 8),
            (OTHER, {}, 0),
            (OTHER, {"priority": 1}, 1),
            (ADMIN, {}, 2),
        ]
        for key, fields, expected in [
            *wanted,
            (ADMIN, {"priority": -9}, -7),
            (ADMIN, {"priority": -(2**31) + 1}, None),
        ]:
            assert ask(key, **fields).status_code == 200
            assert deployment.engine.params[-1].priority == expected or expected is None
        num_submitted = deployment.engine.num_submitted
        for key, stream in itertools.product((USER, OTHER), (False, True)):
            refused = ask(key, priority=-1, stream=stream)
            assert (refused.status_code, "priority" in refused.json()["error"]["message"]) == (403, True)
        assert deployment.engine.num_submitted == num_submitted


def test_without_keys_everybody_chooses_a_priority(client: httpx.Client, deployment: FakeDeployment) -> None:
    assert client.post("/generate", json={**GENERATE, "priority": -3}).status_code == 200
    assert deployment.engine.params[-1].priority == -3


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["holds no keys"]),
        ("{a: b}", ["holds no keys"]),
        ("[[", ["holds no keys"]),
        ("- {name: a, key: secret, limit: 3}", ["entry 1", "limit"]),
        ("- {key: secret}", ["entry 1", "name"]),
        ("- secret: alice", ["entry 1", "name", "key"]),
        ("- {name: a b, key: secret}", ["entry 1", "name"]),
        ("- {name: a, key: sec ret}", ["'a'"]),
        ("- {name: a, key: 'sha256:secret'}", ["'a'"]),
        ("- {name: a, key: secret}\n- {name: b, key: secret}", ["'a'", "'b'"]),
        ("- {name: a, key: secret}\n- {name: a, key: secret2}", ["'a'"]),
        ("- {name: a, key: secret, tokens_per_minute: -1}", ["tokens_per_minute"]),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_without_keys_in_it(tmp_path: Path, text: str, parts: list[str]) -> None:
    with raises(ConfigError, *parts) as caught:
        ring(tmp_path, text)
    assert "secret" not in str(caught.value).replace("sha256:secret", "")


def test_a_file_that_is_not_there() -> None:
    with raises(ConfigError, "/no/such/file"):
        KeyRing(fake_settings(api_keys_file="/no/such/file").server)


def test_a_file_that_others_may_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = ring(tmp_path, USER)
    assert not caplog.records
    (tmp_path / "keys").chmod(0o644)
    keys.reload()
    assert "chmod 600" in caplog.text and USER not in caplog.text


def test_a_file_is_read_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    keys = ring(tmp_path, USER)
    (tmp_path / "keys").write_text(OTHER)
    keys.reload()
    assert keys.find([USER.encode()]) is None and keys.find([OTHER.encode()]) is not None
    (tmp_path / "keys").write_text("")
    with raises(ConfigError):
        keys.reload()
    assert keys.find([OTHER.encode()]) is not None


def test_keys_are_kept_as_digests_and_never_shown() -> None:
    settings = fake_settings(api_keys=[USER], admin_key=ADMIN)
    assert USER not in repr(settings) + str(settings.model_dump(mode="json"))
    assert ADMIN not in repr(settings) + str(settings.model_dump(mode="json"))
    assert USER not in repr(vars(KeyRing(settings.server)))


def test_all_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever is presented, so that the time tells nothing."""
    keys = KeyRing(fake_settings(api_keys=["a", "b", "c"], admin_key="d").server)
    compared = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr("amalgam.server.http.keys.hmac.compare_digest", compare)
    for key in (b"a", b"d", b"x", b""):
        compared.clear()
        keys.find([key])
        assert len(compared) == 4
        assert {len(part) for pair in compared for part in pair} == {32}


def test_errors_of_keys_have_the_common_shape(keyed: httpx.Client) -> None:
    error = keyed.post("/generate", json=GENERATE).json()["error"]
    assert error["type"] == UnauthorizedError.code


def test_keys_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "amalgam")
    for client in ready(fake_settings(port=0, api_keys=[USER], admin_key=ADMIN)):
        for headers in (bearer(USER), {"x-api-key": ADMIN}, bearer("wrong-key")):
            client.post("/generate", json=GENERATE, headers=headers)
            client.post("/reload_weights", headers=headers)
    lines = "\n".join(str(record.__dict__) for record in caplog.records if record.name.startswith("amalgam"))
    assert "key=key-1" in lines and "key=admin" in lines
    assert not any(key in lines for key in (USER, ADMIN, "wrong-key"))


def test_no_endpoint_shows_a_key(keyed: httpx.Client) -> None:
    paths = [path for path in PATHS if "{" not in path and not path.endswith("/events")]
    answers = {path: keyed.get(path, headers=bearer(ADMIN)) for path in paths}
    assert answers["/model_info"].status_code == answers["/metrics"].status_code == 200
    assert [path for path, found in answers.items() if any(key in found.text for key in (USER, OTHER, ADMIN))] == []


def test_where_keys_are_looked_for() -> None:
    headers = [(b"authorization", b"Bearer a"), (b"x-api-key", b" b "), (b"authorization", b"Basic c"), (b"host", b"d")]
    assert presented_keys(headers) == [b"a", b"b"]


def test_openai_s_and_anthropic_s_clients_know_the_errors() -> None:
    with serving(fake_settings(port=0, api_keys=USER, requests_per_minute=1), FakeDeployment) as url:
        wait_until_ready(url)
        wrong = openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as refused:
            wrong.models.list()
        assert refused.value.code == "invalid_api_key"
        right = openai.OpenAI(base_url=url + "/v1", api_key=USER, max_retries=0)
        assert [model.id for model in right.models.list()] == ["fake"]
        right.completions.create(model="fake", prompt="a", max_tokens=1)
        with pytest.raises(openai.RateLimitError) as limited:
            right.completions.create(model="fake", prompt="a", max_tokens=1)
        assert (limited.value.code, limited.value.type) == ("rate_limit_exceeded", "requests")
        assert int(limited.value.response.headers["retry-after"]) > 0
        other = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError):
            other.messages.create(model="fake", max_tokens=1, messages=[{"role": "user", "content": "a"}])
