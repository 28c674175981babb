"""Figures name the commit that they were measured at: it can be looked up."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

CITED = re.compile(r"\bcommits?\s+`?([0-9a-f]{7,40})\b")


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def test_commits_that_documents_name_are_in_the_history() -> None:
    """A commit that was rebased away is still in the repository that made it, and in no clone."""
    if shutil.which("git") is None or git("rev-parse", "--is-shallow-repository").strip() != "false":
        pytest.skip("there is no git, or not the whole history")
    history = git("rev-list", "HEAD").split()
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    cited = {name: file.name for file in files for name in CITED.findall(file.read_text(encoding="utf-8"))}
    assert cited
    missing = [
        f"{name} in {file}" for name, file in cited.items() if not any(commit.startswith(name) for commit in history)
    ]
    assert not missing
