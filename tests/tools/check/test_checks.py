"""Checks against a server that is well, and the same server with one fault after the other."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from amalgam.cli import main
from amalgam.tools.check.checks import access
from amalgam.tools.check.contract import Status
from amalgam.tools.check.keeping import in_git
from amalgam.tools.check.target import Target
from amalgam.tools.load.http import Address
from tests.tools.check.faulty import ADMIN_KEY, FORBIDDEN, KEY, RULE, serving

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
"""
# How long is waited for what comes at once of a server that is well, and never of one with this fault.
WAITS = {"monitoring: {{health_ms: 100000, fresh_seconds: {}}}": "stuck_metrics", "cancel_seconds: {}": "computes_on"}
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
    "breaks": ({"limits.recovery", "limits.rate"}, "limits"),
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
    waits = [line.format(0.5 if fault in faults else 60) for line, fault in WAITS.items()]
    config.write_text("\n".join([THRESHOLDS, *waits, more]))
    rules.write_text(RULES)
    backup = folder / "backup"
    backup.mkdir()
    shutil.copy(config, backup)
    with serving(log, *faults) as url:
        code = main(
            ["check", "--url", url, "--key", KEY, "--admin-key", ADMIN_KEY, "--thresholds", str(config),
             "--log", str(log), "--rules", str(rules), "--server-config", str(config), "--backup", str(backup),
             "--json", *arguments]
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


@pytest.mark.parametrize(
    ("id", "threshold", "status"),
    [
        (
            "performance.tpot",
            "performance: {requests: 2, clients: 2, concurrent_requests: 2, output_tokens: 64, tpot_p95_ms: 1e-6}",
            "fail",
        ),
        ("access.metrics", "access: {keyless_metrics: false}", "fail"),
        ("resources.memory", "resources: {memory_bytes: 1}", "fail"),
        ("resources.memory", "resources: {memory_share: 1e-9, memory_share_fail: 1.0}", "warn"),
        ("resources.disk", "resources: {disk_free_bytes: 1000000000000000000}", "fail"),
        ("resources.descriptors", "resources: {descriptors_share: 1e-9}", "warn"),
    ],
)
def test_what_is_past_a_threshold_is_found(
    id: str, threshold: str, status: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text(threshold)
    _, report = check(capsys, tmp_path, (), "--only", id, "--thresholds", str(strict))
    assert statuses(report) == {id: status}, report["checks"]


def test_what_is_not_encrypted_is_found() -> None:
    finding = asyncio.run(access.encryption.run(Target(Address("http", "far.example", 80))))
    assert finding.status is Status.WARN


@pytest.mark.parametrize(("days", "status"), [(-1, Status.FAIL), (3, Status.WARN), (90, Status.PASS)])
def test_a_certificate_that_ends_soon_is_found(days: int, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    async def certificate(target: Target) -> dict[str, str]:
        return {"notAfter": "Jan  1 00:00:00 2040 GMT"}

    end = ssl.cert_time_to_seconds("Jan  1 00:00:00 2040 GMT")
    monkeypatch.setattr(access, "certificate_of", certificate)
    monkeypatch.setattr(access.time, "time", lambda: end - days * 86400)
    assert asyncio.run(access.encryption.run(Target(Address("https", "far.example", 443)))).status is status


class TestOperation:
    """Of a server that says it is ours, which has one rule, and whose version 2 serves."""

    def found(self, capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> dict[str, str]:
        _, report = check(
            capsys, folder, ("ours",), "--only", "operation", "--only", "resources.disk",
            "--server-config", str(folder / "model.yaml"), *arguments,
        )  # fmt: skip
        found = statuses(report)
        assert found.pop("operation.drain") == "skip"
        return {id.removeprefix("operation."): status for id, status in found.items() if status != "pass"}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """All is well."""
        self.configure(tmp_path)
        shutil.copy(tmp_path / "model.yaml", tmp_path / "copy.yaml")
        lines = [{"version": 1}, {"sound": 1}, {"version": 2, "previous_version": 1}]
        (tmp_path / "history.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"versi')
        return tmp_path

    def configure(self, folder: Path, rule: dict[str, str] = RULE, **more: Any) -> None:
        mixed = {"rules": [rule]}
        data = {
            "model": {"base_path": str(folder), "mixed_precision": mixed},
            "weights": {"history": str(folder / "history.jsonl")},
            **more,
        }
        (folder / "model.yaml").write_text(json.dumps(data))

    def test_nothing_is_invented(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.found(capsys, folder, "--backup", str(folder / "copy.yaml")) == {}

    def test_a_configuration_that_is_kept_nowhere(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.found(capsys, folder) == {"configuration": "warn"}  # the folder has a copy of another file

    def test_a_copy_that_differs(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.configure(folder, server={"port": 9000})
        assert self.found(capsys, folder, "--backup", str(folder / "copy.yaml")) == {"configuration": "warn"}

    def test_what_is_no_configuration(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "model.yaml").write_text("model: {no_such_setting: 1}")
        found = self.found(capsys, folder)
        assert found == {"configuration": "fail", "mapping": "skip", "history": "skip"}

    def test_other_rules_than_those_that_serve(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.configure(folder, {"pattern": "model.layers.1.*", "source": "base"})
        assert self.found(capsys, folder, "--backup", str(folder / "model.yaml")) == {
            "configuration": "warn",  # a file is no copy of itself
            "mapping": "fail",
        }

    @pytest.mark.parametrize("content", [None, "", '{"version": 1}\n'])
    def test_a_history_that_is_not_written(
        self, content: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "history.jsonl").unlink()
        if content is not None:
            (folder / "history.jsonl").write_text(content)
        assert self.found(capsys, folder, "--backup", str(folder / "copy.yaml")) == {"history": "fail"}

    def test_no_history(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.configure(folder, weights={})
        shutil.copy(folder / "model.yaml", folder / "copy.yaml")
        assert self.found(capsys, folder, "--backup", str(folder / "copy.yaml")) == {"history": "warn"}

    def test_disks_are_those_that_are_written_to(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder that has yet to be made is on the disk of the one above it."""
        monkeypatch.setattr(Path, "is_mount", lambda path: path in (folder / "packed", Path("/")))
        (folder / "packed").mkdir()
        self.configure(folder, inference={"packed_cache": str(folder / "packed" / "later")})
        _, report = check(
            capsys, folder, ("ours",), "--only", "resources.disk", "--server-config", str(folder / "model.yaml")
        )
        assert set(report["checks"][0]["measured"]["free_bytes"]) == {"/", str(folder / "packed")}


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="keeps versions")
def test_what_git_keeps(tmp_path: Path) -> None:
    file = tmp_path / "a*.yaml"  # no pattern
    file.write_text("a: 1\n")
    assert not in_git(file).is_kept
    git(tmp_path, "init")
    assert not in_git(file).is_kept
    git(tmp_path, "add", "-A")
    assert not in_git(file).is_kept
    git(tmp_path, "commit", "-m", "first")
    assert in_git(file).is_kept
    (tmp_path / "ab.yaml").write_text("b: 1\n")
    assert in_git(file).is_kept and not in_git(tmp_path / "ab.yaml").is_kept
    link = tmp_path / "link"  # as Kubernetes lays files
    link.symlink_to(file)
    assert in_git(link).is_kept
    file.write_text("a: 2\n")
    assert not in_git(file).is_kept
    (tmp_path / ".gitignore").write_text("ab.yaml\n")
    assert not in_git(tmp_path / "ab.yaml").is_kept


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
