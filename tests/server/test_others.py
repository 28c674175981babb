"""What clients of vLLM and llama-server ask of a server, at their own paths."""

from __future__ import annotations

import threading

import httpx
import pytest

from amalgam.server.permissions import needs_of
from amalgam.version import __version__
from tests.server.conftest import serving, wait_until
from tests.server.fakes import FakeDeployment, fake_settings

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/health"), ("GET", "/ping"), ("POST", "/ping")])
def test_other_health_checks(method: str, path: str) -> None:
    may_load = threading.Event()

    def open_deployment() -> FakeDeployment:
        may_load.wait(60)
        return FakeDeployment()

    with serving(fake_settings(port=0), open_deployment) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.request(method, path).json() == client.get("/health").json() == {"status": "loading"}
        assert client.get("/props").status_code == 503
        assert client.get("/version").json() == {"version": __version__}
        may_load.set()
        wait_until(lambda: bool(client.request(method, path).json() == {"status": "healthy"}))


def test_paths_without_v1(shared_client: httpx.Client) -> None:
    models, chat = ("/models", "/v1/models"), ("/chat/completions", "/v1/chat/completions")
    one, other = (shared_client.get(path).json()["data"] for path in models)
    assert [model["id"] for model in one] == [model["id"] for model in other] == ["fake"]
    answers = [shared_client.post(path, json=CHAT).json()["choices"] for path in chat]
    assert answers[0] == answers[1]
    for path in chat:
        refused = shared_client.post(path, json=CHAT | {"nonsense": 1})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "nonsense")
    for first, second in (models, chat):
        assert needs_of(first) is needs_of(second)


def test_props(client: httpx.Client, deployment: FakeDeployment) -> None:
    props = client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == deployment.engine.max_prompt_tokens + 1
    assert props["default_generation_settings"]["params"] == {}  # this model says nothing of it
    assert props["model_alias"] == client.get("/v1/models").json()["data"][0]["id"]
    assert props["total_slots"] == 32
    assert props["modalities"] == {"vision": False, "audio": False}
    assert __version__ in props["build_info"]
