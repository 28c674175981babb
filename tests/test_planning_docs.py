"""Every command in docs/planning.md runs and answers."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_readme import commands, environment


@pytest.mark.timeout(600)
def test_every_command_of_planning_runs(tmp_path: Path) -> None:
    lines = commands("docs/planning.md")
    assert len(lines) == 5 and all(line.startswith(".venv/bin/amalgam ") for line in lines)
    for line in lines:
        words = shlex.split(line.replace("/tmp/", f"{tmp_path}/"))
        if "--tokens" in words:  # the commands are tested, and not their figures
            place = words.index("--tokens") + 1
            words[place] = str(int(words[place]) // 2)
        elif "--reference" in words or "--config" in words:
            words += ["--tokens", "512"]
        program = [sys.executable, "-m", "amalgam.cli", *words[1:]]
        result = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
        assert result.returncode == 0, (line, result.stderr)
        assert result.stdout.strip(), line
    assert "mixed_precision" in (tmp_path / "plan.yaml").read_text()
