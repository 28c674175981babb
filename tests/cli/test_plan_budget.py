"""`amalgam plan --budget` and `amalgam evaluate --sensitivity` as a user types them, on two layers of the demo."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from tests.planning.conftest import small, texts

from amalgam.cli import main
from amalgam.config.reading import load_settings
from amalgam.tools import plan

__all__ = ["small"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def config(small: Path, tmp_path: Path) -> Path:
    file = tmp_path / "model.yaml"
    sources = {name: str(small / name) for name in ("int3", "int4")}
    file.write_text(
        yaml.safe_dump(
            {
                "model": {"name": "tiny", "base_path": str(small / "base"), "mixed_precision": {"sources": sources}},
                "server": {"port": 9000},
            }
        )
    )
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "mixed.json"
    file.write_text(json.dumps(texts(32)))
    return file


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where sensitivities are kept: the first test measures them for all."""
    return tmp_path_factory.mktemp("kept")


def test_a_plan_is_made_proven_and_written(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    config: Path,
    text: Path,
    cache: Path,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(plan, "FRONTIER_POINTS", 2)
    out, page = tmp_path / "plan.yaml", tmp_path / "frontier.html"
    shared = ["--config", str(config), "--text", str(text), "--cache", str(cache)]
    planning = ["plan", *shared, "--budget", "4.2bpw", "--checks", "0"]
    code, printed, err = run(capsys, *planning, "--out", str(out), "--frontier", str(page), "--json")
    assert code == 0, err
    assert "options of 104 weights" in err, "what it will cost, beforehand"
    report = json.loads(printed)
    assert report["bits_per_weight"] <= 4.2 and 0 <= report["gap"] < 0.01
    assert {"uniform", "hand recipe", "usage only", "sensitivity only", "random"} == {
        rival["kind"] for rival in report["rivals"]
    }
    assert report["is_accepted"] == (report["chosen"] == "plan")
    assert page.read_text().count("hand recipe") and "https://" not in page.read_text()[:200]

    code, printed, err = run(capsys, "evaluate", "--config", str(out), "--text", str(text), "--json")
    assert code == 0, err
    assert json.loads(printed)["domains"]["all"]["divergence"]["value"] > 0
    code, printed, _ = run(capsys, "plan", "--config", str(out), "--json")
    assert code == 0 and {row["source"] for row in json.loads(printed)} <= {"base", "int3", "int4"}

    code, printed, err = run(capsys, *planning, "--out", str(out))
    assert code == 2 and "--force" in err
    code, printed, err = run(capsys, *planning)
    assert code == 0 and "were measured before" in err and "4.2bpw" in printed

    code, printed, err = run(capsys, "evaluate", "--sensitivity", *shared, "--json")
    assert code == 0, err
    measured = json.loads(printed)
    assert len(measured["weights"]) == 104 and set(measured["ranks"]) == {"rounding", "kurtosis", "spectrum"}


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        (["--budget", "4.2bpw"], {"uniform plan", "hand recipe"}),
        (["--budget", "3.3bpw"], {"uniform plan"}),
        (["--budget", "3.9bpw", "--floor", "model.layers.0.*=int4"], set()),
    ],
)
def test_the_verdict_names_the_rivals_that_were_measured(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    text: Path,
    cache: Path,
    tmp_path: Path,
    options: list[str],
    measured: set[str],
) -> None:
    """A budget may have no room for a hand recipe, and one with floors none for a uniform plan either."""
    out = tmp_path / "plan.yaml"
    shared = ["--config", str(config), "--text", str(text), "--cache", str(cache), "--checks", "0"]
    code, printed, err = run(capsys, "plan", *shared, *options, "--out", str(out))
    assert code == 0, err
    verdict = next(line for line in printed.splitlines() if line.startswith(("Accepted", "Not accepted", "Returned")))
    both = ("uniform plan", "hand recipe")
    assert {rival for rival in both if f"the best {rival}" in verdict} == measured
    assert {rival for rival in both if f"No {rival} of these sources" in err} == set(both) - measured
    assert verdict.startswith("Returned without proof") == (not measured)
    head = [line for line in out.read_text().splitlines() if line.startswith("#")]
    compared = [line.partition("the plan's is ")[2] for line in head if "the plan's is " in line]
    assert compared and all(re.fullmatch(r"\d+\.\d% (below|above) it\.", said) for said in compared), compared


def test_a_budget_of_speed_is_kept_by_the_cost_model_and_timed(
    capsys: pytest.CaptureFixture[str], config: Path, text: Path, cache: Path
) -> None:
    """What every plan reaches leaves all weights wide; how fast this machine is decides nothing here."""
    planning = ["plan", "--config", str(config), "--text", str(text), "--cache", str(cache), "--checks", "0", "--json"]
    code, printed, err = run(capsys, *planning, "--budget", "0.001tok/s")
    assert code == 0, err
    report = json.loads(printed)
    assert report["bits_per_weight"] == 16 and report["plan_divergence"]["value"] < 1e-6
    expected, measured = report["tokens_per_second"]
    assert expected > 0.001 and measured > 0.001
    code, _, err = run(capsys, *planning, "--budget", "100000000tok/s")
    assert code == 4 and "100000000tok/s" in err


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["--budget", "2bpw"], 4, "smallest"),
        (["--budget", "cpu:1=15MB,cpu=1KB"], 4, "smallest"),
        (["--budget", "cpu:1=15MB,cuda:77=9MB"], 4, "cuda:77=24GB@1008GB/s"),
        (["--budget", "much"], 2, "'much'"),
        (["--budget", "4bpw", "--all"], 2, "--all"),
        (["--floor", "*=int4"], 2, "--floor"),
        (["--window", "64"], 2, "--window"),
        (["--force"], 2, "--force"),
        (["--all", "--manifest"], 2, "--all and --manifest"),
        (["--budget", "4bpw", "--force"], 2, "--out"),
        (["--budget", "4bpw", "--sha256"], 2, "--sha256"),
        (["--budget", "4bpw", "--sources", "int5"], 4, "'int5'"),
        (["--budget", "4bpw", "--use", "none.npz"], 3, "none.npz"),
    ],
)
def test_what_cannot_be_planned_is_named_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    text: Path,
    tmp_path: Path,
    arguments: list[str],
    code: int,
    named: str,
) -> None:
    cache = tmp_path / "kept"
    measuring = ["--text", str(text), "--cache", str(cache)] if "--budget" in arguments else []
    found, out, err = run(capsys, "plan", "--config", str(config), *measuring, *arguments)
    assert (found, out) == (code, "") and named in err
    assert not cache.exists()


def test_too_little_text_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    file, cache = tmp_path / "few.json", tmp_path / "kept"
    file.write_text(json.dumps(texts(12)))
    planning = ["plan", "--config", str(config), "--text", str(file), "--cache", str(cache), "--budget", "4bpw"]
    code, _, err = run(capsys, *planning)
    assert code == 2 and "too few" in err and not cache.exists()


def test_two_devices_are_filled(
    capsys: pytest.CaptureFixture[str], config: Path, text: Path, cache: Path, tmp_path: Path
) -> None:
    """The card cannot hold all: the most used experts lie there, the others on the processors, none in pieces."""
    out = tmp_path / "split.yaml"
    shared = ["--config", str(config), "--text", str(text), "--cache", str(cache), "--context", "128", "--checks", "0"]
    budget = "cuda=9MB@1000GB/s,cpu=4MB@50GB/s"
    code, printed, err = run(capsys, "plan", *shared, "--budget", budget, "--slack", "0.5", "--out", str(out), "--json")
    assert code == 0, err
    report = json.loads(printed)
    near, far = report["shares"]
    assert near["device"]["name"] == "cuda" and near["is_primary"] and near["num_experts"] + far["num_experts"] == 32
    for share in (near, far):
        taken = share["dense_bytes"] + share["expert_bytes"] + share["other_bytes"]
        assert taken <= share["device"]["budget_bytes"]
        assert share["seconds"] == pytest.approx(share["read_bytes"] / share["device"]["bandwidth"], rel=1e-3)
    assert near["activations"] + far["activations"] == pytest.approx(1) and far["dense_bytes"] == 0
    written = yaml.safe_load(out.read_text())
    assert written["inference"]["device_map"] == "cuda" and list(written["inference"]["devices"]) == ["cuda", "cpu"]
    settings = load_settings(out, {"inference.device_map": "cpu"}, environ={})
    placed = [rule for rule in settings.model.mixed_precision.all_rules if "experts" in rule.pattern]
    assert {rule.device for rule in placed} == {"cuda", "cpu"} and all(rule.source for rule in placed)

    code, printed, err = run(capsys, "plan", *shared, "--budget", "cuda=1MB,cpu=2MB")
    assert code != 0 and "cuda" in err
    assert run(capsys, "plan", *shared, "--budget", "4.2bpw", "--slack", "0.5")[0] == 2
