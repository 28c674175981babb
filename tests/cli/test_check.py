"""`amalgam check`: what it takes, what it writes, how it ends."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from tests.conftest import ROOT
from tests.tools.check.faulty import KEY, serving

from amalgam.cli import main
from amalgam.tools.check.registry import all_checks
from amalgam.tools.check.thresholds import as_yaml, read_thresholds

QUICK = ["--only", "answers.stream", "--only", "monitoring.health", "--only", "monitoring.readiness", "--key", KEY]


def report_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["check", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def test_table_page_and_junit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, junit = tmp_path / "page.html", tmp_path / "out" / "junit.xml"
    with serving(tmp_path / "log", "cut_streams", "no_ready") as url:
        code = main(
            ["check", "--url", url, *QUICK, "--only", "operation.drain", "--html", str(page), "--junit", str(junit)]
        )
    captured = capsys.readouterr()
    assert code == 1 and "NOT ready" in captured.out and url in captured.err
    lines = dict(reversed(line.split("\t")[:2]) for line in captured.out.splitlines() if line.count("\t") == 3)
    del lines["check"]
    assert lines == {
        "answers.stream": "fail", "monitoring.health": "pass", "monitoring.readiness": "warn",
        "operation.drain": "skip",
    }  # fmt: skip
    html = page.read_text()
    assert html.count('class="check fail"') == 1 and html.count('class="check warn"') == 1
    assert "<script" not in html and 'src="' not in html
    root = ET.parse(junit).getroot()
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("4", "1", "1")
    [failure] = root.iter("failure")
    assert failure.get("type") == "answers.stream"
    assert [suite.get("name") for suite in root] == ["answers", "monitoring", "operation"]


def test_a_warning_is_a_failure_where_it_is_strict(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serving(tmp_path / "log", "no_ready") as url:
        assert report_of(capsys, "--url", url, *QUICK)[0] == 0
        assert report_of(capsys, "--url", url, *QUICK, "--strict")[0] == 1


def test_a_servers_texts_are_escaped(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with serving(tmp_path / "log") as url:
        code = main(["check", "--url", url, *QUICK, "--model", "<script>alert(1)</script>", "--html", str(page)])
    assert code == 0 and "<script" not in page.read_text() and "&lt;script&gt;" in page.read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--url", "http://127.0.0.1:1"],
        ["--url", "ftp://there"],
        ["--log", "/no/such/log"],
        ["--server-config", "/no/such/file"],
        ["--rules", "/no/such/rules"],
        ["--pid", "999999999"],
        ["--prometheus", "prometheus"],
    ],
)
def test_what_cannot_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *arguments]) == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("performance: {ttft: 3}", "performance.ttft"),
        ("limits: {body_bytes: many}", "limits.body_bytes"),
        ("monitoring: {alerts: {a: '('}}", "monitoring"),
        ("profile: fast", "profile"),
        ("severity: {limits.rate: pass}", "severity"),
    ],
)
def test_thresholds_that_are_none(text: str, named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "thresholds.yaml"
    path.write_text(text)
    assert main(["check", "--thresholds", str(path)]) == 2
    assert named in capsys.readouterr().err


def test_every_threshold_is_printed_and_read_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "thresholds.yaml"
    assert main(["check", "--profile", "batch", "--print-thresholds"]) == 0
    path.write_text(capsys.readouterr().out)
    assert read_thresholds(path) == read_thresholds(None, "batch") != read_thresholds(None)
    assert yaml.safe_load(path.read_text())["performance"]["ttft_p95_ms"] == 2000
    assert as_yaml(read_thresholds(path)) == path.read_text()


def test_checks_are_listed_and_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--list", "--json", "--only", "limits", "--only", "answers.s*", "--skip", "limits.rate"]) == 0
    listed = {entry["id"] for entry in json.loads(capsys.readouterr().out)}
    assert listed == {
        "answers.stream", "answers.special_tokens", "limits.prompt", "limits.max_tokens", "limits.body",
        "limits.recovery",
    }  # fmt: skip
    assert main(["check", "--only", "speed"]) == 2
    assert main(["check", "--only", "limits.rate", "--skip", "limits"]) == 2
    assert main(["check", "--drain", "1", "--skip", "operation.drain"]) == 2
    assert len({check.id for check in all_checks()}) == len(all_checks())


def test_what_will_be_sent_is_said_and_nothing_more_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with serving(tmp_path / "log") as url:
        assert main(["check", "--url", url, "--dry-run", "--quick", "--max-seconds", "7"]) == 0
    said = capsys.readouterr().out
    assert url in said and "7 s" in said and "SIGTERM" not in said
    assert not (tmp_path / "log").read_text()


def test_the_page_says_how_many_requests_are_sent(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/production/check.md").read_text(encoding="utf-8")
    for flags, before in (((), "at most "), (("--quick",), "(")):
        assert main(["check", "--dry-run", *flags]) == 0
        [number] = re.findall(r"at most (\d+) requests", capsys.readouterr().out)
        assert f"{before}{number} " in page


def test_the_time_is_bounded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "thresholds.yaml"
    config.write_text("performance: {requests: 2000}")
    arguments = ["--only", "performance.ttft", "--thresholds", str(config), "--max-seconds", "1", "--key", KEY]
    with serving(tmp_path / "log") as url:
        code, report = report_of(capsys, "--url", url, *arguments)
    assert code == 2 and not report["ready"] and report["out_of_time"] == ["performance.ttft"]
    assert [entry["status"] for entry in report["checks"]] == ["skip"]


@contextmanager
def process(log: Path, *faults: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and number."""
    command = [sys.executable, "-m", "tests.tools.check.faulty", str(log), *faults]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip(), server.pid
        finally:
            server.kill()


@pytest.mark.parametrize(("faults", "status"), [((), "pass"), (("takes_all",), "fail"), (("ends_at_once",), "fail")])
def test_draining(faults: tuple[str, ...], status: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "thresholds.yaml"
    config.write_text("operation: {drain_tokens: 600}")
    arguments = [
        "--only",
        "operation.drain",
        "--only",
        "monitoring.readiness",
        "--key",
        KEY,
        "--thresholds",
        str(config),
    ]
    with process(tmp_path / "log", *faults) as (url, pid):
        code, report = report_of(capsys, "--url", url, *arguments, "--drain", str(pid))
    drain = report["checks"][-1]
    assert drain["status"] == status, drain
    assert code == (0 if status == "pass" else 1)
    assert ("exit code 3" in drain["value"]) == ("ends_at_once" in faults)


def test_only_the_server_is_ended(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other, serving(tmp_path / "log") as url:
        try:
            assert main(["check", "--url", url, "--key", KEY, "--drain", str(other.pid)]) == 2
            assert other.poll() is None
        finally:
            other.kill()
    capsys.readouterr()
