"""The board and the rules: they are what the code makes, and name nothing that `/metrics` does not have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from amalgam import errors
from amalgam.errors import CheckpointError
from amalgam.server.http import errors as http_errors
from amalgam.server.metrics.board import BOARD, OPERATOR_RULES, RULES, render_board, render_operator_rules, write_files
from amalgam.server.metrics.catalogue import CATALOGUE, PREFIX
from amalgam.server.metrics.queries import SERVER_FAULTS, each, quantiles, rates, shares
from amalgam.server.service import REFUSALS, Status
from tests.errors import raises

ROOT = Path(__file__).parents[2]
RULE_TESTS = ROOT / "deploy/monitoring/rules/tests.yaml"
SERIES = {
    name
    for family in CATALOGUE.values()
    for name in (
        [f"{PREFIX}{family.name}_{part}" for part in ("bucket", "sum", "count")]
        if family.kind == "histogram"
        else [family.series]
    )
}


def queried(expressions: str) -> set[str]:
    """The metrics of ours that expressions name, those of recording rules left out."""
    return set(re.findall(rf"(?<![:\w]){PREFIX}\w+", expressions))


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads((ROOT / BOARD).read_text())


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    groups = [group for path in RULES for group in yaml.safe_load((ROOT / path).read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def test_files_are_what_the_code_makes() -> None:
    assert (ROOT / BOARD).read_text() == render_board(), "python -m amalgam.server.metrics.board writes it anew"
    assert (ROOT / OPERATOR_RULES).read_text() == render_operator_rules(ROOT)


def test_the_board_is_written_into_a_checkout(tmp_path: Path) -> None:
    with raises(CheckpointError, str(tmp_path)):
        write_files(tmp_path)
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    for path in (BOARD, OPERATOR_RULES):
        (tmp_path / path).unlink()
    write_files(tmp_path)
    assert [(tmp_path / path).read_text() for path in (BOARD, OPERATOR_RULES)] == [
        (ROOT / path).read_text() for path in (BOARD, OPERATOR_RULES)
    ]


def test_board_shows_every_metric_and_no_other(board: dict[str, Any]) -> None:
    named = queried("\n".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", ())))
    assert named <= SERIES
    shown = {name for name, family in CATALOGUE.items() if any(re.fullmatch(family.series_pattern, n) for n in named)}
    assert shown == set(CATALOGUE)


def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in board["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24


def test_rules_name_metrics_that_are_there(rules: list[dict[str, Any]]) -> None:
    expressions = "\n".join(rule["expr"] for rule in rules)
    assert queried(expressions) <= SERIES
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert set(re.findall(r"\b(?:job|instance):amalgam_\w+:\w+", expressions)) <= recorded


def test_each_alert_says_how_bad_it_is_and_what_to_do(rules: list[dict[str, Any]]) -> None:
    alerts = [rule for rule in rules if "alert" in rule]
    assert len(alerts) > 10
    tested, described = RULE_TESTS.read_text(), (ROOT / "docs/production.md").read_text()
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning", "info")
        assert set(alert["annotations"]) == {"summary", "description"}
        assert re.search(rf"\b{alert['alert']}\b", tested), alert["alert"]
        assert f"`{alert['alert']}`" in described


def test_metrics_served_are_those_of_the_catalogue() -> None:
    """`metrics.txt` is what a server has given, which another test compares."""
    text = (ROOT / "tests/data/metrics.txt").read_text()
    served = dict(re.findall(rf"^# TYPE {PREFIX}(\w+?)(?:_total)? (\w+)$", text, re.MULTILINE))
    assert served == {name: CATALOGUE[name].kind for name in served}
    for name, labels in re.findall(rf"^{PREFIX}(\w+?)(?:_total|_bucket)?{{(.*)}}$", text, re.MULTILINE):
        found = re.findall(r'(?:^|,)(\w+)="', labels)
        assert found == (["le"] if CATALOGUE[name].kind == "histogram" else list(CATALOGUE[name].labels))


def test_faults_are_the_codes_of_500_and_above(rules: list[dict[str, Any]]) -> None:
    def kinds(kind: type[errors.AmalgamError]) -> set[type[errors.AmalgamError]]:
        return {kind}.union(*map(kinds, kind.__subclasses__()))

    assert http_errors.refusal_of(Exception()).code == "internal_error"
    faults = {kind.code for kind in kinds(errors.AmalgamError) if kind.http_status >= 500}
    faults |= {"internal_error", Status.LOADING, Status.DRAINING, Status.FAILED}
    assert set(SERVER_FAULTS) == faults & set(REFUSALS)
    [failed] = [rule["expr"] for rule in rules if rule.get("record") == "job:amalgam_requests_failed:rate5m"]
    assert re.search(r'reason=~"([^"]*)"', failed).group(1).split("|") == sorted(SERVER_FAULTS)


def test_queries_fit_the_type_of_their_family() -> None:
    assert rates("requests_finished")[0].legend == "{{reason}}"
    assert [query.legend for query in quantiles("step_seconds")] == ["P50", "P95", "P99"]
    [memory] = shares("memory_bytes", "memory_limit_bytes")
    assert " / ignoring(kind) group_left() " in memory.expression
    for wrong in (lambda: rates("kv_blocks"), lambda: quantiles("preemptions"), lambda: each("preemptions")):
        with pytest.raises(AssertionError):
            wrong()
    with pytest.raises(KeyError):
        rates("nothing")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's prometheus)")
def test_rules_do_what_they_say() -> None:
    subprocess.run(["promtool", "check", "rules", "--lint=all", *(ROOT / path for path in RULES)], check=True)
    subprocess.run(["promtool", "test", "rules", RULE_TESTS], check=True)
