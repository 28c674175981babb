"""Environments are made once, whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import BinaryIO

import pytest

from amalgam.errors import UnavailableError
from amalgam.tools.quantizing.environment import open_environment
from tests.errors import raises


def wheel(folder: Path) -> str:
    file = folder / "atool-1.5-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("atool-1.5.dist-info/METADATA", "Metadata-Version: 2.1\nName: atool\nVersion: 1.5\n")
        archive.writestr("atool-1.5.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("atool-1.5.dist-info/RECORD", "")
    return str(file)


def test_it_is_made_once(tmp_path: Path) -> None:
    said: list[str] = []
    folder = tmp_path / "environment"
    for _ in range(2):
        found = open_environment(folder, "atool", [wheel(tmp_path)], said.append)
        assert found.version == "1.5" and found.python.is_relative_to(folder)
    assert len(said) == 1 and str(folder) in said[0]


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with raises(UnavailableError, "atool==9", "--environment"):
        open_environment(tmp_path / "environment", "atool", ["atool==9"])
    assert not list(tmp_path.glob("*environment*")) and not list(tmp_path.glob(".environment.partial"))


def test_an_interrupt_ends_what_has_been_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fifo, program = tmp_path / "fifo", tmp_path / "program"
    os.mkfifo(fifo)
    program.write_text(f"#!/bin/sh\nexec 3> {fifo}\nsleep 3600 & echo begun >&3\nwait\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    said: list[BinaryIO] = []

    def interrupted(process: subprocess.Popen[str]) -> None:
        said.append(fifo.open("rb"))
        said[0].readline()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_environment(tmp_path / "environment", "atool", ["atool==9"])
    assert said[0].read() == b"", "ends when nobody holds it any more"
    said[0].close()
    assert not list(tmp_path.glob(".environment.partial"))


def test_a_folder_without_the_tool_is_named(tmp_path: Path) -> None:
    with raises(UnavailableError, tmp_path, "--environment"):
        open_environment(tmp_path, "atool", ["atool==9"])
