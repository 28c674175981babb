"""How the serving goes, for people and for Prometheus."""

from __future__ import annotations

import itertools
import logging
import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.meter import Meter, SpeculationCounts
from amalgam.engine.request import FinishReason
from amalgam.errors import AmalgamError
from amalgam.experts.saved.files import to_bytes
from amalgam.experts.tracker import ExpertTracker
from amalgam.models.routing import TokenSpan
from amalgam.runtime.changes import RemapRecord
from amalgam.server.service import REFUSALS
from amalgam.version import __version__
from tests.conftest import ROOT
from tests.server.conftest import serving, wait_until
from tests.server.fakes import MAX_SEQ_LENGTH, FakeDeployment, FakeEngine, FakeVersion, fake_settings

LINE = re.compile(r'(amalgam_[a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})? (\S+)')


def samples(text: str) -> dict[tuple[str, str], float]:
    """Metric and labels → value; every line must be well formed, every metric have its help and type before it."""
    found, typed = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            typed.add(line.split()[2])
        elif not line.startswith("# HELP "):
            match = LINE.fullmatch(line)
            assert match, line
            assert any(match[1].startswith(name) for name in typed)
            assert (match[1], match[2] or "") not in found
            found[match[1], match[2] or ""] = float(match[3])
    return found


def test_serving_counts_what_was_served(client: httpx.Client, deployment: FakeDeployment) -> None:
    begun, before = time.time(), client.get("/serving").json()
    assert not any(point["generated_tps"] or point["running_peak"] for point in before["series"])
    assert before["latency"]["first_token"] == {"p50": None, "p90": None, "p99": None}
    deployment.engine.step_seconds = 0.01
    for _ in range(3):
        client.post("/generate", json={"prompt": "abcde", "max_new_tokens": 4})
    answer = client.get("/serving").json()
    assert (answer["prompt_tokens"], answer["generated_tokens"]) == (15, 12)
    assert answer["finished"] == {"length": 3}
    assert answer["throughput"]["generated_tokens_per_second"] > 0
    assert answer["latency"]["num_requests"] == 3
    assert answer["latency"]["first_token"]["p50"] <= answer["latency"]["first_token"]["p99"]
    assert answer["kv"] == {"used_blocks": 2, "total_blocks": 8}
    assert sum(point["generated_tps"] for point in answer["series"]) * 2 == 12
    levels = {"running", "running_peak", "waiting", "waiting_peak", "kv_used", "kv_used_peak"}
    assert answer["series"][-1].keys() == {"t", "prompt_tps", "generated_tps", *levels}
    # Nothing runs now, and yet ten seconds with tokens are not ten seconds with "0 running".
    assert (answer["running"], answer["load"]["running"]["peak"]) == (0, 1)
    assert 0 < answer["load"]["running"]["mean"] < 1
    assert max(point["running_peak"] for point in answer["series"]) == 1
    assert begun <= answer["now"] <= time.time()


def test_remaps_are_remembered(client: httpx.Client, deployment: FakeDeployment) -> None:
    assert client.get("/remaps").json() == {"remaps": []}
    client.post("/update_weight_mapping", json={"weight_mapping": {"a": "b"}})
    deployment.remaps.append(RemapRecord(time.time(), 2, 2, 0, 0, 0.1, "Pattern <b> matches nothing."))
    first, second = client.get("/remaps").json()["remaps"]
    assert first.items() >= {"version": 2, "previous_version": 1, "num_changed": 1, "ok": True}.items()
    assert "error" not in first
    assert (second["ok"], second["error"]) == (False, "Pattern <b> matches nothing.")


def test_metrics_are_prometheus_text(client: httpx.Client, deployment: FakeDeployment) -> None:
    deployment.tracker = ExpertTracker([0, 2], 4, 2, StatisticsSettings())
    deployment.tracker.begin_step([TokenSpan(1, 0, 6, 0, 4)])
    for layer_id in (0, 2):
        deployment.tracker.observe(layer_id, torch.tensor([[3, row % 2] for row in range(6)]), torch.ones(6, 2))
    deployment.tracker.end_step()
    deployment.model_name = 'a"b\\c\n<d>'
    client.post("/generate", json={"prompt": "abcde", "max_new_tokens": 4})
    client.post("/update_weight_mapping", json={"weight_mapping": {"a": "b"}})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(response.text)
    assert found["amalgam_ready", ""] == 1
    assert found["amalgam_generated_tokens_total", ""] == 4
    assert found["amalgam_requests_finished_total", 'reason="length"'] == 1
    assert (
        found["amalgam_first_token_seconds_bucket", 'le="+Inf"'] == found["amalgam_first_token_seconds_count", ""] == 1
    )
    buckets = [value for (name, _), value in found.items() if name == "amalgam_request_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert found["amalgam_weight_version", ""] == 2
    assert found["amalgam_remaps", 'result="ok"'] == 1
    assert found["amalgam_expert_max_to_mean", 'layer="2"'] == 2
    assert found["amalgam_expert_activations", 'phase="prompt"'] == 16
    assert not any("expert=" in labels for _, labels in found)


@pytest.fixture
def counted(deployment: FakeDeployment, tmp_path: Path) -> FakeDeployment:
    """A deployment that has counted experts, with a reference, and has changed its weights."""
    tracker = ExpertTracker([0, 2], 4, 2, StatisticsSettings(reference=str(tmp_path / "reference.npz")))
    tracker.begin_step([TokenSpan(1, 0, 6, 0, 4)])
    for layer_id in (0, 2):
        tracker.observe(layer_id, torch.tensor([[3, row % 2] for row in range(6)]), torch.ones(6, 2))
    tracker.end_step()
    (tmp_path / "reference.npz").write_bytes(to_bytes(tracker.saved_set()))
    deployment.tracker, deployment.model_name = tracker, 'a"b\\c\n<d>'
    deployment.update_weight_mapping({"a": "b"})
    return deployment


def series_of(line: str) -> str:
    return line if line.startswith("#") else line.rpartition(" ")[0]


def test_metrics_keep_their_names_types_labels_and_help(client: httpx.Client, counted: FakeDeployment) -> None:
    """Dashboards and alerts are built on them: the file was written before there was a library for it."""
    expected = (ROOT / "tests/data/metrics.txt").read_text().replace("VERSION", __version__)
    lines = client.get("/metrics").text.splitlines()
    assert {series_of(line) for line in lines} == set(expected.splitlines())
    assert len(lines) == len(set(lines)) == len(expected.splitlines())


def test_guesses_have_metrics_where_there_are_any() -> None:
    deployment, counts = FakeDeployment(), SpeculationCounts(3, 9, 4, (3, 1, 0), 2, 0.5)
    deployment.engine.meter = Meter(speculation=lambda: counts)
    with serving(fake_settings(port=0, metrics_compat="vllm"), lambda: deployment) as url:
        lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    values = {series_of(line): float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
    assert values["amalgam_speculation_proposed_tokens_total"] == 9
    assert values["amalgam_speculation_accepted_tokens_total"] == 4
    assert values['amalgam_speculation_accepted_tokens_by_position_total{position="1"}'] == 1
    assert values["amalgam_speculation_declined_total"] == 2
    of_vllm = {name.partition("{")[0]: value for name, value in values.items() if name.startswith("vllm:spec_decode")}
    assert of_vllm["vllm:spec_decode_num_drafts_total"] == 3
    assert of_vllm["vllm:spec_decode_num_draft_tokens_total"] == 9
    assert of_vllm["vllm:spec_decode_num_accepted_tokens_total"] == 4


def test_metrics_are_openmetrics_where_that_is_asked_for(client: httpx.Client, counted: FakeDeployment) -> None:
    plain = client.get("/metrics").text
    for version in ("", ";version=1.0.0"):
        response = client.get("/metrics", headers={"Accept": f"application/openmetrics-text{version};q=0.9"})
        assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
        families = list(openmetrics.text_string_to_metric_families(response.text))
        series = {(sample.name, *sorted(sample.labels.items())) for family in families for sample in family.samples}
        assert len(series) == len(samples(plain))
    for accept in ("application/openmetrics-text;version=x.y", "text/plain;version=x", "", ",;=", "*/*"):
        response = client.get("/metrics", headers={"Accept": accept})
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


def test_metrics_of_a_server_that_loads() -> None:
    may_load = threading.Event()

    def open_deployment() -> FakeDeployment:
        may_load.wait(60)
        return FakeDeployment(FakeEngine())

    with serving(fake_settings(port=0), open_deployment) as base_url:
        found = samples(httpx.get(base_url + "/metrics", timeout=60).text)
        assert found["amalgam_ready", ""] == 0
        assert httpx.get(base_url + "/serving", timeout=60).status_code == 503
        may_load.set()


def refused(client: httpx.Client) -> dict[str, float]:
    """Refusals by reason, without those that have not happened."""
    found = samples(client.get("/metrics").text)
    series = {labels: value for (name, labels), value in found.items() if name == "amalgam_requests_refused_total"}
    return {labels.removeprefix('reason="').rstrip('"'): value for labels, value in series.items() if value}


def test_refusals_are_counted_by_reason(client: httpx.Client, deployment: FakeDeployment) -> None:
    assert refused(client) == {}
    generate: dict[str, Any] = {"url": "/generate", "headers": {"content-type": "application/json"}}
    client.post(**generate, content=b'{"prompt": "a", "max_new_tokens": 0}')
    client.post(**generate, content=b'{"prompt"')
    client.post(**generate, content=b'{"prompt": "%s"}' % (b"x" * MAX_SEQ_LENGTH))
    client.post(**generate, content=b'{"prompt": "%s"}' % (b"x" * 9 * 2**20))
    client.post("/generate", content=b"{}", headers={"content-type": "text/plain"})
    client.post("/batch_generate", json={"prompts": ["a"] * 5})
    client.get("/nowhere")
    client.get("/generate")
    deployment.engine.max_queue = 0
    for _ in range(3):
        client.post("/generate", json={"prompt": "a"})
    deployment.engine.max_queue = 8
    client.post("/generate", json={"prompt": "a"}).raise_for_status()
    assert refused(client) == {
        "invalid_request": 2,
        "invalid_json": 1,
        "prompt_too_long": 1,
        "body_too_large": 1,
        "unsupported_media_type": 1,
        "not_found": 1,
        "method_not_allowed": 1,
        "overloaded": 3,
    }


def test_a_server_that_is_not_ready_counts_what_it_refuses_but_no_probes() -> None:
    may_load = threading.Event()

    def open_deployment() -> FakeDeployment:
        may_load.wait(60)
        return FakeDeployment(FakeEngine())

    with (
        serving(fake_settings(port=0), open_deployment) as base_url,
        httpx.Client(base_url=base_url, timeout=60) as client,
    ):
        for _ in range(2):
            assert client.get("/ready").status_code == 503
        assert client.post("/generate", json={"prompt": "a"}).status_code == 503
        assert refused(client) == {"loading": 1}
        may_load.set()


def test_every_error_has_a_series_from_the_start() -> None:
    def codes(kind: type[AmalgamError]) -> set[str]:
        return {kind.code}.union(*(codes(child) for child in kind.__subclasses__()))

    assert set(REFUSALS) >= codes(AmalgamError)


def test_labelled_counters_begin_at_zero(client: httpx.Client) -> None:
    found = samples(client.get("/metrics").text)
    for name, reasons in (
        ("finished", list(FinishReason)),
        ("refused", list(REFUSALS)),
    ):
        series = {labels for metric, labels in found if metric == f"amalgam_requests_{name}_total"}
        assert series == {f'reason="{reason}"' for reason in reasons}
        assert all(found[f"amalgam_requests_{name}_total", labels] == 0 for labels in series)


@pytest.mark.parametrize("logs_probes", [True, False])
def test_probes_can_be_left_out_of_the_access_log(logs_probes: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "amalgam.server")
    settings = fake_settings(port=0, log_probes=logs_probes)
    with serving(settings, FakeDeployment) as base_url, httpx.Client(base_url=base_url, timeout=60) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        for path in ("/health", "/metrics", "/serving", "/readyz"):
            client.get(path)
    lines = [record.getMessage().split()[:2] for record in caplog.records if record.getMessage().startswith("GET ")]
    paths = {path for _, path in lines}
    assert paths == {"/serving", "/readyz"} | ({"/ready", "/health", "/metrics"} if logs_probes else set())


@pytest.mark.parametrize("path", ["/serving", "/remaps"])
def test_no_query_is_taken(shared_client: httpx.Client, path: str) -> None:
    assert shared_client.get(path + "?x=1").status_code == 422


# What the queries of vLLM's published board (examples/observability/prometheus_grafana/grafana.json) name.
BOARD = {
    "e2e_request_latency_seconds": "histogram", "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram", "request_queue_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram", "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram", "request_generation_tokens": "histogram",
    "request_max_num_generation_tokens": "histogram", "prompt_tokens_total": "counter",
    "generation_tokens_total": "counter", "request_success_total": "counter", "num_requests_running": "gauge",
    "num_requests_waiting": "gauge", "kv_cache_usage_perc": "gauge",
}  # fmt: skip
# What else vLLM documents and both count.
ALSO = {
    "prefix_cache_queries_total": "counter", "prefix_cache_hits_total": "counter", "num_preemptions_total": "counter",
    "iteration_tokens_total": "histogram", "cache_config_info": "gauge",
    "request_time_per_output_token_seconds": "histogram", "request_inference_time_seconds": "histogram",
}  # fmt: skip
# What boards made for older versions of vLLM ask for.
OLDER = {
    "gpu_cache_usage_perc": "gauge", "time_per_output_token_seconds": "histogram",
    "gpu_prefix_cache_queries_total": "counter", "gpu_prefix_cache_hits_total": "counter",
}  # fmt: skip
VLLM = BOARD | ALSO | OLDER


def test_vllm_s_board_draws_from_its_names() -> None:
    with (
        serving(fake_settings(port=0, metrics_compat="vllm"), FakeDeployment) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        wait_until(lambda: client.get("/ready").status_code == 200)
        client.post("/generate", json={"prompt": "abcde", "max_new_tokens": 4})
        plain = client.get("/metrics").text
        accepted = client.get("/metrics", headers={"Accept": "application/openmetrics-text"}).text
    types = dict(line.split()[2:4] for line in plain.splitlines() if line.startswith("# TYPE vllm:"))
    assert types == {f"vllm:{name}": kind for name, kind in VLLM.items()}
    found = {}
    for family in text_string_to_metric_families(plain):
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                assert (sample.labels.pop("model_name"), sample.labels.pop("engine")) == ("fake", "0")
                found[sample.name, *sorted(sample.labels.items())] = sample.value
    assert found["vllm:generation_tokens_total",] == 4
    assert found["vllm:prompt_tokens_total",] == 5
    assert found["vllm:kv_cache_usage_perc",] == found["vllm:gpu_cache_usage_perc",] == 0.25
    assert found["vllm:request_success_total", ("finished_reason", "length")] == 1
    assert {key[1][1] for key in found if key[0] == "vllm:request_success_total"} == {
        "stop",
        "length",
        "abort",
        "error",
        "content_filter",
    }
    for name, kind in VLLM.items():
        if kind == "histogram":
            assert found[f"vllm:{name}_bucket", ("le", "+Inf")] == found[f"vllm:{name}_count",]
            assert (f"vllm:{name}_sum",) in found
    assert found["vllm:e2e_request_latency_seconds_count",] == 1
    assert list(openmetrics.text_string_to_metric_families(accepted))


def test_without_being_asked_for_vllm_s_names_are_not_there(client: httpx.Client) -> None:
    assert "vllm:" not in client.get("/metrics").text


def test_activations_are_counted_by_format(client: httpx.Client, counted: FakeDeployment) -> None:
    counted.engine.version = FakeVersion(3)
    origins = counted.engine.version.origins
    for layer, expert, part in itertools.product((0, 2), range(4), ("gate", "up", "down")):
        slot = f"layers.{layer}.mlp.experts.{expert}.{part}"
        kind = "int4" if expert == 3 and part != "down" else "bf16"
        origins[slot] = SimpleNamespace(name=slot, format=kind, source="base", shape=(2, 2))
        counted.engine.version.weights[slot] = SimpleNamespace(nbytes=8)
    found = samples(client.get("/metrics").text)
    name = "amalgam_expert_activations_by_format_total"
    values = {labels: value for (metric, labels), value in found.items() if metric == name}
    # Six tokens in two layers: each goes to expert 3, and to expert 0 or 1.
    assert values == {
        'format="int4",projection="gate"': 12, 'format="bf16",projection="gate"': 12,
        'format="int4",projection="up"': 12, 'format="bf16",projection="up"': 12,
        'format="bf16",projection="down"': 24,
    }  # fmt: skip
