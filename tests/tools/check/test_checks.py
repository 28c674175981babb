"""Checks against a server that is well, and the same server with one fault after the other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amalgam.cli import main
from tests.tools.check.faulty import ADMIN_KEY, FORBIDDEN, KEY, serving

# Nothing here hangs on how fast or how full the machine is.
THRESHOLDS = f"""
performance:
  requests: 3
  clients: 3
  concurrent_requests: 6
  output_tokens: 12
  prompt_tokens: 24
  ttft_p95_ms: 0
  tpot_p95_ms: 0
  stream_tokens_per_second: 0.001
  total_tokens_per_second: 0.001
  requests_per_second: 0.001
  latency_p99_ms: 0
resources: {{memory_share: 1.0, memory_share_fail: 1.0, disk_free_bytes: 0, descriptors_share: 1.0}}
limits: {{body_bytes: 200000, rate_requests: 9}}
filters: {{input_marker: {FORBIDDEN}, output_marker: {FORBIDDEN}}}
privacy: {{log_seconds: 0}}
monitoring: {{health_ms: 100000, fresh_seconds: 0.3}}
cancel_seconds: 0.6
"""
RULES = """
groups:
- name: tiny
  rules:
  - {record: "tiny:errors:rate", expr: "rate(tiny_requests_refused_total[5m])"}
  - {alert: Slow, expr: 'histogram_quantile(0.99, sum by (le) (rate(tiny_request_seconds_bucket{job="tiny"}[5m]))) > 3'}
  - {alert: Errors, expr: "tiny:errors:rate > 0.01"}
  - {alert: Away, expr: 'up{job="tiny"} == 0'}
  - {alert: Memory, expr: "process_resident_memory_bytes > 8e9"}
"""
# A fault → the checks that find it, and the category that is asked.
FAULTS = {
    "no_key": ({"access.key", "access.admin"}, "access"),
    "any_key": ({"access.wrong_key", "access.admin"}, "access"),
    "open_administration": ({"access.admin"}, "access"),
    "any_origin": ({"access.origins"}, "access"),
    "flaky": ({"performance.errors"}, "performance"),
    "cut_streams": ({"answers.stream"}, "answers"),
    "one_event": ({"answers.stream"}, "answers"),
    "counts_wrong": ({"answers.usage"}, "answers"),
    "mixes": ({"answers.isolation"}, "answers"),
    "same_ids": ({"answers.isolation"}, "answers"),
    "obeys_tokens": ({"answers.special_tokens"}, "answers"),
    "computes_on": ({"answers.cancellation"}, "answers"),
    "stack_traces": ({"answers.errors"}, "answers"),
    "no_error_object": ({"answers.errors"}, "answers"),
    "fails_on_long": ({"limits.prompt"}, "limits"),
    "cuts_prompts": ({"limits.prompt"}, "limits"),
    "fails_on_zero": ({"limits.max_tokens"}, "limits"),
    "any_body": ({"limits.body"}, "limits"),
    "no_rate": ({"limits.rate"}, "limits"),
    "unfiltered": ({"filters.input", "filters.output"}, "filters"),
    "unfiltered_streams": ({"filters.output"}, "filters"),
    "logs_bodies": ({"privacy.log"}, "privacy"),
    "leaks_key": ({"privacy.log_keys"}, "privacy"),
    "labels_users": ({"privacy.metrics"}, "privacy"),
    "no_health": ({"monitoring.health"}, "monitoring"),
    "no_ready": ({"monitoring.readiness"}, "monitoring"),
    "few_metrics": ({"monitoring.metrics", "monitoring.alerts"}, "monitoring"),
    "broken_metrics": ({"monitoring.metrics"}, "monitoring"),
    "stuck_metrics": ({"monitoring.counting"}, "monitoring"),
}


def check(
    capsys: pytest.CaptureFixture[str], folder: Path, faults: tuple[str, ...], *arguments: str, more: str = ""
) -> tuple[int, dict[str, Any]]:
    """The exit code and the report of a server with faults."""
    config, log, rules = folder / "thresholds.yaml", folder / "server.log", folder / "rules.yaml"
    config.write_text(THRESHOLDS + more)
    rules.write_text(RULES)
    with serving(log, *faults) as url:
        code = main(
            ["check", "--url", url, "--key", KEY, "--admin-key", ADMIN_KEY, "--thresholds", str(config),
             "--log", str(log), "--rules", str(rules), "--server-config", str(config), "--json", *arguments]
        )  # fmt: skip
    return code, json.loads(capsys.readouterr().out)


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {entry["id"]: entry["status"] for entry in report["checks"]}


def faults_of(report: dict[str, Any]) -> set[str]:
    return {id for id, status in statuses(report).items() if status in ("warn", "fail")}


def test_nothing_is_invented(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, report = check(capsys, tmp_path, ())
    assert faults_of(report) == set(), report["checks"]
    assert code == 0 and report["ready"]
    skipped = {id for id, status in statuses(report).items() if status == "skip"}
    assert skipped == {"access.encryption", "operation.mapping", "operation.history", "operation.drain"}
    assert report["model"] == "tiny" and report["requests_sent"] > 100
    assert set(report["summary"]) == {"pass", "warn", "fail", "skip"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_no_other(fault: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found_by, category = FAULTS[fault]
    _, report = check(capsys, tmp_path, (fault,), "--only", category)
    assert faults_of(report) == found_by, report["checks"]
    mended = [entry for entry in report["checks"] if entry["id"] in found_by]
    assert all(entry["value"] and entry["why"] and entry["remedy"] for entry in mended)


def test_answers_by_chance_are_told_from_a_mixture(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    _, report = check(capsys, tmp_path, ("random",), "--only", "answers.determinism", "--only", "answers.isolation")
    assert statuses(report) == {"answers.determinism": "warn", "answers.isolation": "warn"}


def test_slowness_is_found(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    strict = (
        "performance: {requests: 2, clients: 2, concurrent_requests: 2, output_tokens: 4, prompt_tokens: 24,"
        " ttft_p95_ms: 20, tpot_p95_ms: 0, stream_tokens_per_second: 1e6, total_tokens_per_second: 1e6,"
        " requests_per_second: 1e6, latency_p99_ms: 20}\nmonitoring: {health_ms: 200}\n"
    )
    config = tmp_path / "strict.yaml"
    config.write_text(strict)
    _, report = check(
        capsys, tmp_path, ("slow", "slow_health"), "--only", "performance", "--only", "monitoring.health*",
        "--thresholds", str(config),
    )  # fmt: skip
    expected = {"ttft", "stream_rate", "total_rate", "request_rate", "latency"}
    assert faults_of(report) == {f"performance.{name}" for name in expected} | {"monitoring.health_under_load"}


def test_everything_bad_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    faults = (
        "no_key", "any_origin", "flaky", "cut_streams", "counts_wrong", "mixes", "obeys_tokens", "computes_on",
        "stack_traces", "fails_on_long", "any_body", "no_rate", "unfiltered", "logs_bodies", "leaks_key",
        "labels_users", "no_health", "no_ready", "stuck_metrics",
    )  # fmt: skip
    code, report = check(capsys, tmp_path, faults)
    expected = set.union(*(FAULTS[fault][0] for fault in faults))
    assert code == 1 and faults_of(report) == expected, report["checks"]


def test_rules_that_ask_for_what_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rules = tmp_path / "other.yaml"
    rules.write_text("groups: [{name: a, rules: [{alert: Slow, expr: 'tiny_no_such_latency_seconds > 1'}]}]")
    _, report = check(capsys, tmp_path, (), "--only", "monitoring.alerts", "--rules", str(rules))
    [alerts] = report["checks"]
    assert alerts["status"] == "fail" and "tiny_no_such_latency_seconds" in alerts["value"]


@pytest.mark.parametrize(
    ("faults", "status"), [((), "pass"), (("sick_rules",), "fail"), (("unscraped",), "fail"), (("no_api",), "fail")]
)
def test_what_a_prometheus_has_loaded(
    faults: tuple[str, ...], status: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with serving(tmp_path / "log", *faults) as url:
        prometheus = f"{url}/nowhere" if "no_api" in faults else url
        code = main(
            ["check", "--url", url, "--key", KEY, "--only", "monitoring.alerts", "--prometheus", prometheus, "--json"]
        )
    [alerts] = json.loads(capsys.readouterr().out)["checks"]
    assert (alerts["status"], code) == (status, int(status == "fail")), alerts


def test_a_limit_of_the_rate_is_waited_for_and_no_fault(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [part for id in ("answers.stream", "performance.ttft", "limits.rate") for part in ("--only", id)]
    _, report = check(capsys, tmp_path, ("tight_rate", "no_rate"), *arguments)
    assert statuses(report) == {"performance.ttft": "skip", "answers.stream": "pass", "limits.rate": "pass"}


def test_severities_are_the_users(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = "severity: {answers.special_tokens: warn, limits.rate: fail}\n"
    arguments = ["--only", "answers.special_tokens", "--only", "limits.rate"]
    code, report = check(capsys, tmp_path, ("obeys_tokens", "no_rate"), *arguments, more=more)
    assert code == 1 and statuses(report) == {"answers.special_tokens": "warn", "limits.rate": "fail"}
