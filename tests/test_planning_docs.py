"""Every command in docs/planning.md runs and answers, on two of the demo's layers."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml

from amalgam.cli import main
from amalgam.evaluation import quality
from tests.conftest import ROOT
from tests.planning.conftest import small
from tests.test_readme import commands

__all__ = ["small"]


@pytest.fixture
def config(small: Path, tmp_path: Path) -> Path:
    """The demo's, of the small model; its sources are made at the first use."""
    settings = yaml.safe_load((ROOT / "config" / "model_config.yaml").read_text())
    model, mixed = settings["model"], settings["model"]["mixed_precision"]
    model["base_path"] = str(small / "base")
    mixed |= {"fp8_path": str(tmp_path / "fp8"), "int4_path": str(tmp_path / "int4")}
    mapping = mixed["weight_mapping"]
    mixed["weight_mapping"] = {name: source for name, source in mapping.items() if name.split(".")[2] in "*01"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def test_every_command_of_planning_runs(
    config: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quality, "CHANCE", 1)  # two layers alone are not much better than that
    lines = commands("docs/planning.md")
    assert len(lines) == 5 and all(line.startswith(".venv/bin/amalgam ") for line in lines)
    for line in lines:
        words = shlex.split(line)[1:]
        for place, word in enumerate(words):
            if word.startswith("/tmp/"):
                words[place] = str(tmp_path / word.removeprefix("/tmp/"))
        places = {"config/model_config.yaml": str(config), "models/demo": str(small / "base")}
        words = [places.get(word, word) for word in words]
        if "--tokens" in words:  # the commands are tested, and not their figures
            place = words.index("--tokens") + 1
            words[place] = str(int(words[place]) // 2)
        elif "evaluate" in words:
            words += ["--tokens", "512"]
        code = main(words)
        captured = capsys.readouterr()
        assert code == 0, (line, captured.err)
        assert captured.out.strip(), line
    assert "mixed_precision" in (tmp_path / "plan.yaml").read_text()
