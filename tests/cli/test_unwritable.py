"""What cannot be written in the end is refused at the beginning, before anything is measured, read or asked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.conftest import DEMO

from amalgam.cli import main

OUT = "OUT"
MODEL = ("--model", str(DEMO))
TEXT = ("--text", "README.md")

# Each goes on to something that is refused too, or to a server that is not there, if the file is not looked at first.
VERBS: dict[str, tuple[str, ...]] = {
    "plan --out": ("plan", *MODEL, *TEXT, "--budget", "4bpw", "--out", OUT),
    "plan --frontier": ("plan", *MODEL, *TEXT, "--budget", "4bpw", "--frontier", OUT),
    "plan --cache": ("plan", *MODEL, *TEXT, "--budget", "4bpw", "--cache", OUT),
    "evaluate --cache": ("evaluate", *MODEL, *TEXT, "--sensitivity", "--cache", OUT),
    "prune --curve": ("prune", *MODEL, "--experts", "1", "--text", "/nowhere.txt", "--curve", OUT),
    "prune --out": ("prune", *MODEL, "--experts", "1", "--text", "/nowhere.txt", "--out", OUT),
    "distill --curve": ("distill", str(DEMO), "--curve", OUT),
    "quantize": ("quantize", str(DEMO), OUT, "--format", "int4", "--method", "gptq", "--calibrate", "/nowhere.txt"),
    "export": ("export", OUT, "--model", "/nowhere/model", "--to", "vllm"),
    "demo": ("demo", OUT),
    "bench cache --out": ("bench", "cache", *MODEL, "--num-tokens", "9999999", "--out", OUT),
    "bench serve --out": ("bench", "serve", "--url", "http://127.0.0.1:9", "--out", OUT),
    "bench serve --records": ("bench", "serve", "--url", "http://127.0.0.1:9", "--records", OUT),
    "experts --save": ("experts", "--url", "http://127.0.0.1:9", "--save", OUT),
    "generate --output": ("generate", "--model", "/nowhere/model", "--input", "README.md", "--output", OUT),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_takes_no_file_is_refused_first(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "out")
    assert main([place if word == OUT else word for word in VERBS[verb]]) == 3
    err = capsys.readouterr().err
    assert err.startswith(f"Error: {place} cannot be written (") and "Not a directory" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_reports_of_checks_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose exit code says that checks could not run."""
    for flag in ("--html", "--junit"):
        assert main(["check", "--url", "http://127.0.0.1:1", flag, str(tmp_path)]) == 2
        assert f"{tmp_path} cannot be written" in capsys.readouterr().err


def test_a_folder_without_permission_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    place = str(tmp_path / "new" / "out.html")
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9", "--out", place]) == 3
    err = capsys.readouterr().err
    assert place in err and "Permission denied" in err and not list(tmp_path.iterdir())
