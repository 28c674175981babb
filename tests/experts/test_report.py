"""Exports parse back, and are written complete, inside their folder, or not at all."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from amalgam.errors import ConfigError, RequestError
from amalgam.experts.report import export, write_export
from amalgam.experts.statistics import describe_experts
from amalgam.experts.tracker import ExpertSnapshot
from tests.experts.routing import Clock, make_tracker, run_tokens


@pytest.fixture
def snapshot() -> ExpertSnapshot:
    clock = Clock()
    tracker = make_tracker(clock)
    clock.now += 1.5
    run_tokens(tracker, 3)
    return tracker.snapshot()


def test_json_holds_the_whole_answer(snapshot: ExpertSnapshot) -> None:
    result = export(snapshot)
    assert (result.file_name, result.media_type) == ("expert_stats_19700112T134641.500000Z.json", "application/json")
    assert json.loads(result.text) == describe_experts(snapshot)


def test_csv_holds_a_line_per_expert(snapshot: ExpertSnapshot) -> None:
    result = export(snapshot, "csv")
    assert result.file_name.endswith(".csv")
    assert result.media_type == "text/csv"
    lines = list(csv.DictReader(io.StringIO(result.text)))
    expected = describe_experts(snapshot)["expert_stats"]
    assert [list(line) for line in lines] == [list(row) for row in expected]
    for line, row in zip(lines, expected, strict=True):
        assert {name: float(text) if text else None for name, text in line.items()} == row


@pytest.mark.parametrize("format_name", ["xml", "", "JSON", None, 3, ["json"]])
def test_an_unknown_format_is_refused(snapshot: ExpertSnapshot, format_name: Any) -> None:
    with pytest.raises(RequestError, match=r"format is .*Allowed: json, csv\."):
        export(snapshot, format_name)


def test_a_file_is_written_complete(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "exports"
    path = write_export(folder, "a.csv", "x,y\n1,é\n")
    assert path.read_bytes() == "x,y\n1,é\n".encode()
    write_export(folder, "a.csv", "again")
    assert {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()} == {"a.csv": "again"}


@pytest.mark.parametrize("name", ["../a", "/tmp/a", "a/b", "a\\b", "", ".", "..", ".hidden", "a\n", "a\0", "a" * 201])
def test_a_name_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="plain name"):
        write_export(tmp_path / "exports", name, "text")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "exports"
    outside.write_text("untouched")
    folder.mkdir()
    (folder / "a.json").symlink_to(outside)
    write_export(folder, "a.json", "{}")
    assert outside.read_text() == "untouched"
    assert (folder / "a.json").read_text() == "{}"


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(ConfigError, match=r"Cannot write to the export folder .*export_dir"):
        write_export(tmp_path, "a.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError):
        write_export(tmp_path / "file", "a.json", "{}")
