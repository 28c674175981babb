"""Expert statistics, their reports and traces, over real HTTP."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.request import Observation
from amalgam.experts.saved.files import from_bytes
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import TokenSpan
from tests.server.conftest import serving, wait_until_ready
from tests.server.fakes import FakeDeployment, FakeVersion, fake_settings
from tests.server.test_native import events

NUM_TOKENS = 6
HOSTILE = ["<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "../../../etc/passwd", "%00", "明月"]


@pytest.fixture
def deployment() -> FakeDeployment:
    """With statistics of one step: 6 tokens, 2 layers, 4 experts of which expert 3 and one other are active."""
    tracker = ExpertTracker([0, 2], num_experts=4, top_k=2, settings=StatisticsSettings(pair_sampling=1))
    tracker.begin_step([TokenSpan(1, 0, NUM_TOKENS, 0, 4)])
    for layer_id in (0, 2):
        expert_ids = torch.tensor([[3, row % 2] for row in range(NUM_TOKENS)])
        tracker.observe(layer_id, expert_ids, torch.full((NUM_TOKENS, 2), 0.5))
    tracker.end_step()
    tracker.count_request()
    return FakeDeployment(tracker=tracker)


def test_expert_stats(client: httpx.Client) -> None:
    answer = client.get("/expert_stats").json()
    summary = answer["summary"]
    assert summary["total_activations"] == NUM_TOKENS * 2 * 2
    assert (summary["total_tokens"], summary["total_requests"]) == (NUM_TOKENS, 1)
    assert (summary["total_layers"], summary["total_experts"]) == (2, 8)
    assert summary["uptime"] > 0
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


def test_a_model_without_statistics_says_so(shared_client: httpx.Client) -> None:
    response = shared_client.get("/expert_stats")
    assert response.status_code == 422
    assert "statistics.enabled" in response.json()["error"]["message"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "exports"


@pytest.fixture
def exporting(deployment: FakeDeployment, folder: Path) -> Iterator[httpx.Client]:
    """A server whose exports go to `folder`."""
    with serving(fake_settings(port=0, export_dir=str(folder)), lambda: deployment) as base_url:
        wait_until_ready(base_url)
        with httpx.Client(base_url=base_url, timeout=60) as client:
            yield client


@pytest.mark.parametrize("format_name", ["json", "csv", "parquet", "npz", "png", "html"])
def test_every_format_is_exported(exporting: httpx.Client, folder: Path, format_name: str) -> None:
    answer = exporting.post("/export_expert_stats", json={"format": format_name}).json()
    content = answer["content"].encode() if answer["encoding"] == "text" else base64.b64decode(answer["content"])
    assert (folder / answer["file_name"]).read_bytes() == content
    beginnings = {
        "json": b"{",
        "csv": b"layer_id,",
        "parquet": b"PAR1",
        "npz": b"PK",
        "png": b"\x89PNG",
        "html": b"<!do",
    }
    assert content.startswith(beginnings[format_name])
    if format_name == "json":
        assert json.loads(content)["summary"]["total_tokens"] == NUM_TOKENS
    if format_name == "npz":
        assert from_bytes(content, "it").total.num_tokens.sum() == NUM_TOKENS


def test_expert_stats_carry_hints_drift_and_labels(client: httpx.Client) -> None:
    answer = client.get("/expert_stats").json()
    assert answer["hints"] == [] and answer["labels"] == []
    assert answer["drift"]["tokens"] == NUM_TOKENS
    row = answer["layer_stats"][0]
    assert row.keys() >= {"gini", "max_violation", "mean_to_max", "coverage", "num_dead_experts", "num_hot_experts"}
    assert answer["expert_stats"][0]["decaying_rate"] > 0


def test_grid(client: httpx.Client) -> None:
    answer = client.get("/experts/grid").json()
    assert (answer["layer_ids"], answer["num_experts"], answer["total_tokens"]) == ([0, 2], 4, NUM_TOKENS)
    assert answer["values"] == [[3, 3, 0, 6], [3, 3, 0, 6]]
    assert answer["window"].keys() == {"minutes", "start", "end", "seconds"}
    assert answer["balance"][0].keys() >= {"max_to_mean", "normalized_entropy", "gini", "coverage"}
    assert answer["balance"][0]["coverage"] == {"50": 1, "90": 3, "99": 3}
    generated = client.get("/experts/grid", params={"phase": "generated", "measure": "gate_mass", "minutes": 5}).json()
    assert generated["total_tokens"] == 2 and generated["values"][0] == [0.5, 0.5, 0, 1]


@pytest.mark.parametrize(
    "query",
    [{"minutes": "-1"}, {"minutes": "0"}, {"minutes": "nan"}, {"minutes": "inf"}, {"minutes": "1e999"},
     {"minutes": "x"}, {"minutes": "100000"}, {"phase": "x"}, {"measure": "x"}, {"label": "nobody"},
     {"label": "a" * 65}, {"label": "x", "minutes": "1"}, {"unknown": "1"}],
)  # fmt: skip
def test_a_bad_grid_query_is_refused(client: httpx.Client, query: dict[str, str]) -> None:
    response = client.get("/experts/grid", params=query)
    assert response.status_code == 422
    assert response.json()["error"]["message"]


def test_pairs_and_concentration(client: httpx.Client) -> None:
    answer = client.get("/experts/coactivation", params={"layer_id": 0}).json()
    assert answer["sampled_tokens"] == NUM_TOKENS and answer["sampling"] == 1
    assert answer["pairs"] == [[3, 0, 0, 3], [0, 3, 0, 3], [0, 0, 0, 0], [3, 3, 0, 6]]
    answer = client.get("/experts/transitions", params={"layer_id": 0}).json()
    assert answer["next_layer_id"] == 2 and answer["matrix"][3] == [3, 3, 0, 6]
    layers = client.get("/experts/concentration").json()["layers"]
    assert layers[1]["lorenz"] == [0, 0, 0.25, 0.5, 1]
    for query in ({"layer_id": 2}, {"layer_id": 1}, {"layer_id": -1}, {"layer_id": "x"}, {}):
        assert client.get("/experts/transitions", params=query).status_code == 422
    assert client.get("/experts/coactivation", params={"layer_id": 2**70}).status_code == 422


@pytest.mark.parametrize(
    "query",
    ["expert_stats?top_k=1&top_k=2", "experts/grid?minutes=1&minutes=1", "experts/coactivation?layer_id=0&layer_id=2"],
)
def test_a_query_says_each_thing_once(client: httpx.Client, query: str) -> None:
    response = client.get(f"/{query}")
    assert response.status_code == 422
    assert "stands 2 times" in response.json()["error"]["message"]


@pytest.mark.parametrize("domain", HOSTILE)
def test_a_domain_is_counted_and_stays_a_name(client: httpx.Client, deployment: FakeDeployment, domain: str) -> None:
    tracker = deployment.tracker
    response = client.post("/generate", json={"prompt": "a", "max_new_tokens": 1, "domain": domain})
    assert response.status_code == 200
    assert deployment.engine.observations == [Observation(label=domain)]
    tracker.admit(1, domain, 0)  # what the engine does
    assert client.get("/experts/labels").json() == {"labels": [{"label": domain, "tokens": 0}], "max_labels": 64}
    assert client.get("/experts/grid", params={"label": domain}).json()["label"] == domain
    report = client.get("/experts/report")
    assert report.status_code == 200 and "<script" not in report.text and "<img src=x" not in report.text


@pytest.mark.parametrize("domain", ["", "a" * 65, 3, ["a"], True])
def test_a_bad_domain_is_refused(client: httpx.Client, domain: Any) -> None:
    body = {"prompt": "a", "max_new_tokens": 1, "domain": domain}
    assert client.post("/generate", json=body).status_code == 422


def test_routed_experts_come_with_the_answer(client: httpx.Client) -> None:
    body = {"prompt": "abc", "max_new_tokens": 2, "routed_experts": True}
    expected = {"layer_ids": [0, 2], "expert_ids": [[[row % 4, 3]] * 2 for row in range(4)]}
    assert client.post("/generate", json=body).json()["routed_experts"] == expected
    batch = {"prompts": ["abc", "abc"], "max_new_tokens": 2, "routed_experts": True}
    answer = client.post("/batch_generate", json=batch).json()
    assert answer["generated_texts"] == ["w0 w1 "] * 2
    assert [details["routed_experts"] for details in answer["details"]] == [expected] * 2
    with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        *_, last, _ = events(response)
    assert last["routed_experts"] == expected
    assert "routed_experts" not in client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).json()


def test_trace(client: httpx.Client, deployment: FakeDeployment) -> None:
    answer = client.post("/experts/trace", json={"text": "hey"}).json()
    assert [token["text"] for token in answer["tokens"]] == ["h", "e", "y"]
    assert [token["id"] for token in answer["tokens"]] == [104, 101, 121]
    assert answer["layer_ids"] == [0, 2]
    assert np.array(answer["experts"]).shape == np.array(answer["gate_weights"]).shape == (3, 2, 2)
    assert client.post("/experts/trace", json={"text": "hey", "record": True}).status_code == 200
    assert [item.is_counted for item in deployment.engine.observations] == [False, True]
    assert all(item.wants_trace for item in deployment.engine.observations)
    for body in ({}, {"text": ""}, {"text": "a", "chat": 1}, {"text": "a", "x": 1}, {"text": "a" * 100}):
        assert 400 <= client.post("/experts/trace", json=body).status_code < 500


def test_saved_sets_are_compared_and_merged(exporting: httpx.Client, folder: Path) -> None:
    answer = exporting.post("/experts/sets", json={"name": "monday"}).json()
    assert answer == {"name": "monday", "file_name": "monday.safetensors", "tokens": NUM_TOKENS, "labels": []}
    answer = exporting.post("/experts/sets", json={"name": "both", "merge": ["monday", "monday"]}).json()
    assert answer["tokens"] == 2 * NUM_TOKENS
    assert exporting.get("/experts/sets").json() == {"sets": ["both", "monday"]}
    answer = exporting.get("/experts/compare", params={"a": "saved:monday"}).json()
    assert (answer["a"], answer["b"]) == ("saved:monday", "all")
    assert answer["jensen_shannon"] == {"by_layer": [0, 0], "mean": 0}
    assert np.array(answer["difference"]).shape == (2, 4)
    for name in ("../x", "a/b", "", "x" * 201, ".x", "a\x00"):
        assert exporting.post("/experts/sets", json={"name": name}).status_code == 422
        assert exporting.post("/experts/sets", json={"name": "y", "merge": [name]}).status_code == 422
        assert exporting.get("/experts/compare", params={"a": f"saved:{name}"}).status_code == 422
    assert sorted(path.name for path in folder.iterdir()) == ["both.safetensors", "monday.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["exports"]


def test_a_set_with_the_longest_name_is_known_by_its_file_name_too(exporting: httpx.Client) -> None:
    name = "x" * 200
    file_name = exporting.post("/experts/sets", json={"name": name}).json()["file_name"]
    for given in (name, file_name, f"{name}.npz"):
        answer = exporting.post("/experts/sets", json={"name": given, "merge": [given]})
        assert (answer.status_code, answer.json()["name"]) == (200, name)
        assert exporting.get("/experts/compare", params={"a": f"saved:{given}"}).status_code == 200
    for wrong in ("x" * 201, f"x{file_name}"):
        assert exporting.post("/experts/sets", json={"name": wrong}).status_code == 422


def test_report_and_heatmap(client: httpx.Client) -> None:
    report = client.get("/experts/report")
    assert report.headers["content-type"].startswith("text/html")
    assert report.headers["content-security-policy"].startswith("default-src 'none'")
    image = client.get("/experts/heatmap.png", params={"minutes": 5})
    assert image.headers["content-type"] == "image/png" and image.content.startswith(b"\x89PNG")


def test_a_reference_that_cannot_be_used_costs_only_the_drift(deployment: FakeDeployment, tmp_path: Path) -> None:
    reference = tmp_path / "gone.npz"
    settings = StatisticsSettings(reference=str(reference))
    deployment.tracker = ExpertTracker([0, 2], num_experts=4, top_k=2, settings=settings)
    with serving(fake_settings(port=0, export_dir=str(tmp_path)), lambda: deployment) as url:
        wait_until_ready(url)
        with httpx.Client(base_url=url, timeout=60) as client:
            metrics = client.get("/metrics")
            assert metrics.status_code == 200
            assert "amalgam_expert_gini" in metrics.text and "drift" not in metrics.text
            for path in ("/experts/heatmap.png", "/experts/report", "/experts/hints", "/experts/grid"):
                assert client.get(path).status_code == 200, path
            for name in ("json", "csv", "parquet", "npz", "png", "html"):
                assert client.post("/export_expert_stats", json={"format": name}).status_code == 200, name
            drift = client.get("/expert_stats").json()["drift"]
            assert drift.keys() == {"error"} and str(reference) in drift["error"]


def test_precision_map_and_hints(client: httpx.Client) -> None:
    answer = client.get("/experts/precision_map").json()
    assert answer["projections"] == ["gate", "up", "down"]
    assert np.array(answer["formats"]).shape == np.array(answer["bytes"]).shape == (2, 4, 3)
    assert client.get("/experts/hints").json() == {"hints": [], "tokens": 6, "min_tokens": 256}


def test_precision_maps_of_all_versions_in_memory(client: httpx.Client, deployment: FakeDeployment) -> None:
    other = FakeVersion(7)
    slot = "layers.0.mlp.experts.1.up"
    other.origins[slot] = SimpleNamespace(name="a.up", format="int4", source="int4", shape=(2, 2))
    other.weights[slot] = SimpleNamespace(nbytes=2)
    deployment.named["candidate"] = other
    path = "/experts/precision_map"
    answer = client.get(path, params={"weight_version": 7})
    assert answer.json()["weight_version"] == 7
    assert answer.json()["formats"][0][1] == ["", "int4", ""]
    assert client.get(path).json() == client.get(path, params={"weight_version": 1}).json()
    assert client.get(path).json()["formats"][0][1] == ["", "", ""]
    missing = client.get(path, params={"weight_version": 3})
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "version_not_found")

    headers = {"If-None-Match": answer.headers["etag"]}
    kept = client.get(path, params={"weight_version": 7}, headers=headers)
    assert (kept.status_code, kept.content) == (304, b"")
    assert kept.headers["cache-control"] == "private, no-cache"
    other_weights = FakeVersion(7)  # as a restart with another mapping has them
    deployment.named["candidate"] = other_weights
    assert client.get(path, params={"weight_version": 7}, headers=headers).json()["formats"][0][1] == ["", "", ""]


@pytest.mark.parametrize(
    "path", ["grid", "labels", "compare?a=all", "coactivation?layer_id=0", "transitions?layer_id=0", "concentration",
             "hints", "precision_map", "report", "heatmap.png"],
)  # fmt: skip
def test_without_statistics_every_path_says_so(shared_client: httpx.Client, path: str) -> None:
    response = shared_client.get(f"/experts/{path}")
    assert response.status_code == 422
    assert "statistics.enabled" in response.json()["error"]["message"]


def test_numbers_are_finite_json(client: httpx.Client) -> None:
    client.post("/reset_expert_stats")
    for path in ("/expert_stats", "/experts/grid", "/experts/concentration", "/experts/compare?a=all", "/serving"):
        answer = client.get(path)
        assert answer.status_code == 200

        def refuse(name: str) -> float:
            raise AssertionError(name)

        json.loads(answer.text, parse_constant=refuse)
    assert math.isfinite(client.get("/experts/grid").json()["window"]["seconds"])


def test_the_export_parses_back(client: httpx.Client, exporting: httpx.Client) -> None:
    answer = exporting.post("/export_expert_stats", json={"format": "npz"}).json()
    with np.load(io.BytesIO(base64.b64decode(answer["content"])), allow_pickle=False) as arrays:
        assert arrays["counts"].sum() == NUM_TOKENS * 4
    assert exporting.post("/export_expert_stats", json={"format": "xml"}).status_code == 422
    assert exporting.post("/export_expert_stats", json={"format": "npz", "minutes": 1}).status_code == 422
    assert exporting.post("/export_expert_stats", json={"minutes": -1}).status_code == 422
