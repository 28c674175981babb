"""Weights, health."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from amalgam.engine.request import RequestOutput, Usage
from amalgam.errors import ConflictError, PlanError
from tests.server.fakes import FakeDeployment, FakeVersion

REMAP = {
    "weight_version", "previous_version", "fingerprint", "num_changed", "changes", "num_loaded", "loaded_bytes",
    "shared_bytes", "seconds",
}  # fmt: skip
CHANGE = {"source_before": "base", "source_after": "int4", "format_before": "bf16", "format_after": "int4"}


def test_update_weight_mapping(client: httpx.Client) -> None:
    answer = client.post("/update_weight_mapping", json={"weight_mapping": {"a.weight": "int4"}}).json()
    assert answer.keys() == REMAP
    assert (answer["previous_version"], answer["weight_version"], answer["num_changed"]) == (1, 2, 1)
    [change] = answer["changes"]
    assert change.items() >= {**CHANGE, "num_weights": 1, "examples": ["a.weight"]}.items()
    assert client.get("/").json()["weight_version"] == 2


def test_a_large_remap_answers_with_a_summary_and_lists_on_request(client: httpx.Client) -> None:
    mapping = {f"{index}.weight": "int4" if index % 3 else "fp8" for index in range(300)}
    answer = client.post("/update_weight_mapping", json={"weight_mapping": mapping})
    assert len(answer.content) < 2000
    sizes = [
        (c["source_after"], c["num_weights"], c["bytes_before"], c["bytes_after"]) for c in answer.json()["changes"]
    ]
    assert sizes == [("int4", 200, 800, 400), ("fp8", 100, 400, 200)]
    answer = client.post("/update_weight_mapping", json={"weight_mapping": mapping, "details": True})
    assert [change["name"] for change in answer.json()["changed"]] == list(mapping)
    assert answer.json()["changed"][1] == {"name": "1.weight", **CHANGE, "bytes_before": 4, "bytes_after": 2}
    assert client.post("/reload_weights", json={"details": True}).json()["changed"] == []


@pytest.mark.parametrize("body", [{}, {"json": {}}])
def test_reload_weights(client: httpx.Client, body: dict[str, object]) -> None:
    answer = client.post("/reload_weights", **body).json()  # type: ignore[arg-type]
    assert answer.keys() == REMAP
    assert answer["weight_version"] == 2


def test_generation_goes_on_during_a_remap(
    client: httpx.Client, deployment: FakeDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, may_end = threading.Event(), threading.Event()
    update = deployment.update_weight_mapping

    def held_update(mapping: dict[str, str]) -> Any:
        has_begun.set()
        assert may_end.wait(60)
        return update(mapping)

    monkeypatch.setattr(deployment, "update_weight_mapping", held_update, raising=False)
    with ThreadPoolExecutor(1) as pool:
        remap = pool.submit(client.post, "/update_weight_mapping", json={"weight_mapping": {"a": "int4"}})
        assert has_begun.wait(60)
        for _ in range(5):
            answer = client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).json()
            assert answer["weight_version"] == 1
        assert not remap.done()
        may_end.set()
        assert remap.result().status_code == 200


@pytest.mark.parametrize(
    ("error", "status"), [(PlanError("Pattern 'x' matches nothing."), 422), (ConflictError("Under way."), 409)]
)
def test_a_refused_mapping_has_its_status(
    client: httpx.Client, deployment: FakeDeployment, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int
) -> None:
    def refuse(mapping: dict[str, str]) -> None:
        raise error

    monkeypatch.setattr(deployment, "update_weight_mapping", refuse, raising=False)
    response = client.post("/update_weight_mapping", json={"weight_mapping": {"x": "base"}})
    assert response.status_code == status
    assert str(error) in response.json()["error"]["message"]


HI = [{"role": "user", "content": "a"}]
GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "a", "max_new_tokens": 1}),
    ("/generate", {"prompt": "a", "max_new_tokens": 1, "stream": True}),
    ("/batch_generate", {"prompts": ["a", "b"], "max_new_tokens": 1}),
    ("/experts/trace", {"text": "a"}),
    ("/dashboard/chat", {"messages": HI, "max_new_tokens": 1}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 1}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 1, "stream": True}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 1}),
    ("/v1/embeddings", {"input": "a"}),
    ("/v1/messages", {"model": "fake", "messages": HI, "max_tokens": 1}),
    ("/v1/messages", {"model": "fake", "messages": HI, "max_tokens": 1, "stream": True}),
]


def test_a_request_gets_the_weights_that_it_asks_for_and_is_told_which(
    client: httpx.Client, deployment: FakeDeployment
) -> None:
    deployment.named["careful"] = FakeVersion(7)
    for path, body in GENERATING:
        for weights, version in ((None, 1), ("careful", 7), (1, 1), ("1", 1)):
            answer = client.post(path, json={**body, "weights": weights})
            assert answer.status_code == 200, answer.text
            assert answer.headers["X-Amalgam-Weight-Version"] == str(version), path
            if path.startswith("/v1/") and path != "/v1/messages":
                assert "system_fingerprint" in answer.text
                assert f"-weights-{version}" in answer.text and f"-weights-{8 - version}" not in answer.text
            elif path in ("/generate", "/batch_generate", "/v1/messages"):
                assert f'"weight_version":{version}' in answer.text.replace(" ", "")
        refused = client.post(path, json={**body, "weights": "nobody"})
        assert refused.status_code == 404 and "nobody" in refused.text, path
        assert client.post(path, json={**body, "weights": True}).status_code in (400, 422), path
    assert deployment.engine.embedded_by == [1, 7, 1, 1]
    assert "X-Amalgam-Weight-Version" not in client.get("/model_info").headers


def test_embeddings_name_the_version_that_answered(
    client: httpx.Client, deployment: FakeDeployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that was chosen may have failed: then the one before answers."""
    embed = deployment.engine.embed

    async def embed_on_another(prompt_ids: Any, pooling: str, observation: Any, version: Any, on_output: Any) -> Any:
        on_output(RequestOutput(1, "", (), usage=Usage(1, 0, 0.0, 0.0, 0.0, version=5)))
        return await embed(prompt_ids, pooling, observation, version)

    monkeypatch.setattr(deployment.engine, "embed", embed_on_another)
    answer = client.post("/v1/embeddings", json={"input": ["a", "b"]})
    assert answer.json()["system_fingerprint"].endswith("-weights-5")
    assert answer.headers["X-Amalgam-Weight-Version"] == "5"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/weights/difference?before=1&detials=true", None),
        ("GET", "/manifest?sha265=true", None),
        ("PUT", "/weights/pins/1", {"name": "a"}),
        ("POST", "/weights/canary/promote", {"share": 1}),
        ("POST", "/weights/shadow/promote", {"share": 1}),
    ],
)
def test_what_nobody_reads_is_refused(client: httpx.Client, method: str, path: str, body: Any) -> None:
    answer = client.request(method, path, json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_request")


def test_health_and_ready(client: httpx.Client, deployment: FakeDeployment) -> None:
    assert client.get("/health").json() == client.get("/ready").json() == {"status": "healthy"}
    deployment.engine.is_alive = False
    for path in ("/health", "/ready", "/model_info"):
        assert client.get(path).status_code == 503
    assert client.get("/").json()["status"] == "failed"
    assert client.post("/generate", json={"prompt": "a"}).status_code == 503


@pytest.mark.parametrize("value", [{}, {"source": None}, {"device": "tpu"}, {"sorce": "fp8"}, ["fp8"], 8])
def test_a_placement_that_says_nothing_or_something_else_is_refused(client: httpx.Client, value: Any) -> None:
    answer = client.post("/update_weight_mapping", json={"weight_mapping": {"a.weight": value}})
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "invalid_request")


def test_a_rule_may_say_a_device(client: httpx.Client, deployment: FakeDeployment) -> None:
    mapping = {"a.weight": {"source": "int4", "device": "cuda:0"}, "b.weight": {"device": "cpu"}, "c.weight": "fp8"}
    assert client.post("/update_weight_mapping", json={"weight_mapping": mapping}).status_code == 200
    assert [rule.model_dump() for rule in deployment.rules] == [
        {"pattern": "a.weight", "source": "int4", "device": "cuda"},
        {"pattern": "b.weight", "device": "cpu"},
        {"pattern": "c.weight", "source": "fp8"},
    ]
