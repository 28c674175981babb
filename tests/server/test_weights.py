"""Weights, health."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from amalgam.errors import ConflictError, PlanError
from tests.server.fakes import FakeDeployment

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


def test_health_and_ready(client: httpx.Client, deployment: FakeDeployment) -> None:
    assert client.get("/health").json() == client.get("/ready").json() == {"status": "healthy"}
    deployment.engine.is_alive = False
    for path in ("/health", "/ready", "/model_info"):
        assert client.get(path).status_code == 503
    assert client.get("/").json()["status"] == "failed"
    assert client.post("/generate", json={"prompt": "a"}).status_code == 503
