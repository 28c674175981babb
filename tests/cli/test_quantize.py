"""The verb: what docs/planning/quantize.md shows runs, and says what was done."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import ROOT
from tests.planning.conftest import small

from amalgam.cli import main

__all__ = ["small"]

PAGE = ROOT / "docs" / "planning" / "quantize.md"
COMMANDS = re.findall(r"^amalgam quantize .*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
TEXT = "The ferry left at nine, and nobody on the pier saw who had been standing at its rail. "


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 5


@pytest.fixture(scope="module")
def layer(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of the demo's layers."""
    folder = tmp_path_factory.mktemp("layer")
    shutil.copytree(small / "base", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in tensors.items() if ".layers.1." not in name}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page(
    line: str, layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one of the demo's layers in its place."""
    words = shlex.split(line.replace("/tmp/", f"{tmp_path}/").replace("models/demo", str(layer)))
    if "--calibrate" in words:
        words += ["--calibration-tokens", "1024"]
        (tmp_path / "texts.json").write_text(json.dumps([TEXT * 80]))
    monkeypatch.chdir(tmp_path)
    assert main(words[1:]) == 0
    stdout = capsys.readouterr().out
    out = next(Path(word) for word in words if word.startswith(str(tmp_path)))
    assert (out / "config.json").is_file() and str(out) in stdout
    if "--json" in words:
        report = json.loads(stdout)
        assert report["method"] == "awq" and report["calibration"]["tokens"] == 1024
        assert len(report["calibration"]["experts"]) == 16
    elif "--calibrate" in words:
        assert "1024 tokens" in stdout and "fewest" in stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--method", "gptq"], "--calibrate"),
        (["--method", "best"], "best"),
        (["--sequence-length", "64"], "--calibrate"),
        (["--method", "search", "--damping", "0.1"], "--method gptq"),
        (["--calibrate", "nowhere.json", "--method", "awq"], "nowhere.json"),
        (["--activations", "dynamic"], "int4"),
        (["--zero-points", "--format", "fp8"], "zero points"),
        (["--group-size", "48"], "48"),
        (["--environment", "here"], "--with"),
        (["--iterations", "5"], "--with"),
        (["--with", "auto-round", "--method", "gptq"], "signround"),
        (["--with", "llm-compressor", "--method", "round", "--iterations", "5"], "--with auto-round"),
        (["--with", "llm-compressor", "--method", "round", "--no-act-order"], "--method gptq"),
    ],
)
def test_what_cannot_be_done_is_said(
    options: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options if "--format" in options else ["--format", "int4", *options]
    assert main(["quantize", str(ROOT / "models" / "demo"), str(tmp_path / "out"), *given]) == 2
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
