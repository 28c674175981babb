"""Weights, expert statistics, health."""

from __future__ import annotations

import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from amalgam.config import StatisticsSettings
from amalgam.errors import ConflictError, PlanError
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.context import TokenSpan
from tests.server.conftest import serving, wait_until
from tests.server.fakes import FakeDeployment, fake_settings

REMAP = {
    "weight_version", "previous_version", "fingerprint", "num_changed", "changed", "num_loaded", "loaded_bytes",
    "shared_bytes", "seconds",
}  # fmt: skip
NUM_TOKENS = 6


@pytest.fixture
def deployment() -> FakeDeployment:
    """With statistics of one step: 6 tokens, 2 layers, 4 experts of which expert 3 and one other are active."""
    tracker = ExpertTracker([0, 2], num_experts=4, top_k=2, settings=StatisticsSettings())
    tracker.begin_step([TokenSpan(1, 0, NUM_TOKENS, 0, 4)])
    for layer_id in (0, 2):
        expert_ids = torch.tensor([[3, row % 2] for row in range(NUM_TOKENS)])
        tracker.observe(layer_id, expert_ids, torch.full((NUM_TOKENS, 2), 0.5))
    tracker.end_step()
    tracker.count_request()
    return FakeDeployment(observer=tracker)


def test_update_weight_mapping(client: httpx.Client) -> None:
    answer = client.post("/update_weight_mapping", json={"weight_mapping": {"a.weight": "int4"}}).json()
    assert answer.keys() == REMAP
    assert (answer["previous_version"], answer["weight_version"], answer["num_changed"]) == (1, 2, 1)
    formats = {"format_before": "bf16", "format_after": "int4"}
    assert answer["changed"] == [{"name": "a.weight", "source_before": "base", "source_after": "int4", **formats}]
    assert client.get("/").json()["weight_version"] == 2


@pytest.mark.parametrize("body", [{}, {"json": {}}])
def test_reload_weights(client: httpx.Client, body: dict[str, object]) -> None:
    answer = client.post("/reload_weights", **body).json()  # type: ignore[arg-type]
    assert answer.keys() == REMAP
    assert answer["weight_version"] == 2


def test_generation_goes_on_during_a_remap(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.remap_seconds = 0.5
    with ThreadPoolExecutor(1) as pool:
        remap = pool.submit(client.post, "/reload_weights")
        for _ in range(5):
            answer = client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).json()
            assert answer["weight_version"] == 1
        assert not remap.done()
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


def test_expert_stats(client: httpx.Client) -> None:
    answer = client.get("/expert_stats").json()
    summary = answer["summary"]
    assert summary["total_activations"] == NUM_TOKENS * 2 * 2
    assert (summary["total_tokens"], summary["total_requests"]) == (NUM_TOKENS, 1)
    assert (summary["total_layers"], summary["total_experts"]) == (2, 8)
    assert summary["uptime"] >= 0
    assert answer["expert_stats"][0].keys() >= {"layer_id", "expert_id", "activation_count", "last_activation"}
    assert [item["layer_id"] for item in answer["layer_stats"]] == [0, 2]
    assert [(item["layer_id"], item["expert_id"]) for item in answer["top_experts"][:2]] == [(0, 3), (2, 3)]
    assert answer["top_experts"][0]["activation_count"] == NUM_TOKENS
    assert answer["recent_activations"]


def test_expert_stats_take_parameters_either_way(client: httpx.Client) -> None:
    by_query = client.get("/expert_stats", params={"top_k": 3, "minutes": 5}).json()
    by_body = client.post("/expert_stats", json={"top_k": 3, "minutes": 5}).json()
    for answer in (by_query, by_body):
        assert len(answer["top_experts"]) == 3
        assert answer["window"]["minutes"] == 5
        assert answer["summary"]["total_tokens"] == NUM_TOKENS
    assert client.post("/expert_stats").status_code == 200
    assert client.post("/expert_stats", json={"top_k": 9}).status_code == 422
    assert client.post("/expert_stats", json={"minutes": 1e9}).status_code == 422


@pytest.mark.parametrize("body", [{}, {"json": {}}])
def test_reset_expert_stats(client: httpx.Client, body: dict[str, object]) -> None:
    answer = client.post("/reset_expert_stats", **body).json()  # type: ignore[arg-type]
    assert (answer["activations"], answer["tokens"], answer["requests"]) == (NUM_TOKENS * 4, NUM_TOKENS, 1)
    assert client.get("/expert_stats").json()["summary"]["total_activations"] == 0


def test_export_expert_stats(deployment: FakeDeployment, tmp_path: Path) -> None:
    folder = tmp_path / "exports"
    with serving(fake_settings(port=0, export_dir=str(folder)), lambda: deployment) as base_url:
        wait_until(lambda: httpx.get(base_url + "/ready").status_code == 200)
        as_json = httpx.post(base_url + "/export_expert_stats").json()
        as_csv = httpx.post(base_url + "/export_expert_stats", json={"format": "csv"}).json()
    assert json.loads(as_json["content"])["summary"]["total_tokens"] == NUM_TOKENS
    rows = list(csv.DictReader(io.StringIO(as_csv["content"])))
    assert sum(int(row["activation_count"]) for row in rows) == NUM_TOKENS * 4
    for answer in (as_json, as_csv):
        assert (folder / answer["file_name"]).read_text(encoding="utf-8") == answer["content"]


def test_a_model_without_statistics_says_so(shared_client: httpx.Client) -> None:
    response = shared_client.get("/expert_stats")
    assert response.status_code == 422
    assert "statistics.enabled" in response.json()["error"]["message"]


def test_health_and_ready(client: httpx.Client, deployment: FakeDeployment) -> None:
    assert client.get("/health").json() == client.get("/ready").json() == {"status": "healthy"}
    deployment.engine.is_alive = False
    for path in ("/health", "/ready", "/model_info"):
        assert client.get(path).status_code == 503
    assert client.get("/").json()["status"] == "failed"
    assert client.post("/generate", json={"prompt": "a"}).status_code == 503
