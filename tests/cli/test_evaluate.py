"""`amalgam evaluate` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import DEMO

from amalgam.cli import main


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "sea.jsonl"
    lines = [{"text": f"{number} ships went out to sea, and the wind was cold."} for number in range(24)]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["evaluate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_configuration_is_measured_against_base(
    capsys: pytest.CaptureFixture[str], demo_config: Path, text: Path
) -> None:
    code, out, err = run(capsys, "--config", str(demo_config), "--text", f"tales={text}", "--json")
    assert code == 0, err
    report = json.loads(out)
    found = report["domains"]["all"]
    assert report["unit"] == "documents" and found["num_units"] == 24
    divergence = found["divergence"]
    assert 0 < divergence["low"] < divergence["value"] < divergence["high"] < 0.1
    assert divergence["value"] < found["percentile_99"]["value"] <= found["percentile_999"]["value"]
    assert 0.5 < found["agreement"]["value"] <= 1
    assert report["plan_bytes"] < report["reference_bytes"]


def test_a_table_says_what_it_shows(capsys: pytest.CaptureFixture[str], demo_config: Path, text: Path) -> None:
    code, out, err = run(capsys, "--config", str(demo_config), "--reference", str(demo_config), "--text", str(text))
    assert code == 0, err
    title, columns, row, *_ = out.splitlines()
    assert "demo" in title and columns.split("\t")[0] == "domain" and row.split("\t")[5].startswith("0.00000 ")


def test_two_models_side_by_side(capsys: pytest.CaptureFixture[str], derived: Path, text: Path) -> None:
    code, out, err = run(capsys, "--model", str(DEMO), "--versus", str(derived / "int4"), "--text", str(text), "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["second"]["weights_bytes"] < report["first"]["weights_bytes"]
    assert set(report["first"]["speed"]) == set(report["second"]["speed"]) != set()
    assert report["divergence"]["divergence"]["value"] > 0
    assert report["differences"]["weights_bytes"]["value"] < 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", str(DEMO)], "--text"),
        (["--model", str(DEMO), "--text", "none.txt"], "none.txt"),
        (["--model", str(DEMO), "--window", "100000", "--text", "TEXT"], "100000"),
    ],
)
def test_what_cannot_be_measured_is_named(
    capsys: pytest.CaptureFixture[str], text: Path, arguments: list[str], named: str
) -> None:
    code, out, err = run(capsys, *(str(text) if item == "TEXT" else item for item in arguments))
    assert code == 2 and out == "" and named in err
