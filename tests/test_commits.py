"""Figures name the commit that they were measured at: it can be looked up."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

CITED = re.compile(r"\bcommits?\s+`?([0-9a-f]{7,40})\b")


def git(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], input=text, capture_output=True, text=True, timeout=60)


def test_commits_that_documents_name_exist() -> None:
    if shutil.which("git") is None or git("rev-parse", "--is-shallow-repository").stdout.strip() != "false":
        pytest.skip("there is no git, or not the whole history")
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    cited = {name: file.name for file in files for name in CITED.findall(file.read_text(encoding="utf-8"))}
    assert cited
    found = git("cat-file", "--batch-check=%(objecttype)", text="\n".join(cited)).stdout.splitlines()
    missing = [f"{name} in {cited[name]}" for name, kind in zip(cited, found, strict=True) if kind != "commit"]
    assert not missing
