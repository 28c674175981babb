"""What installers see, and what the site is made of."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from website.commands import problem_of, shell_lines
from website.links import LINK, without_links_out

from amalgam.cli import main
from amalgam.tools.demo import copy_demo
from amalgam.version import __version__
from tests.conftest import ROOT


def test_the_changelog_knows_the_version() -> None:
    """A release has a heading with its number; what is to become one is in the unreleased part."""
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", __version__)
    assert headings[0] in ("Unreleased", __version__)
    assert headings == list(dict.fromkeys(headings))


def test_documents_show_verbs_and_options_that_there_are() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    lines = {line: path.name for path in documents for line in shell_lines(path.read_text(encoding="utf-8"))}
    assert len(lines) > 50
    assert [(name, line, problem) for line, name in lines.items() if (problem := problem_of(line))] == []


@pytest.mark.parametrize(
    "line",
    ["amalgam surf", "amalgam serve --prot 1", "true | .venv/bin/amalgam chat --modle x", "amalgam bench --slo x"],
)
def test_a_command_that_is_none_is_noticed(line: str) -> None:
    assert problem_of(line)


def test_the_demo_is_a_folder_to_try_things_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "demo"
    assert main(["demo", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert main(["config", "--config", str(folder / "config/model_config.yaml"), "base_path", "--json"]) == 0
    for name in ("config/model_config.yaml", "examples/test_client.py", "models/demo/model.safetensors"):
        assert (folder / name).read_bytes() == (ROOT / name).read_bytes()
    (folder / "config/model_config.yaml").write_text("mine")
    assert main(["demo", str(folder)]) == 3
    assert (folder / "config/model_config.yaml").read_text() == "mine"


def test_a_full_disk_is_told_in_a_sentence(tmp_path: Path) -> None:
    """What cannot be copied is a list of tuples to shutil; one of them says why."""
    folder = tmp_path / "demo"
    script = (
        "import resource, signal, sys; from amalgam.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.exit(main(['demo', sys.argv[1]]))"
    )
    result = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True)
    assert result.returncode == 3 and result.stderr.count("\n") == 1
    assert f"{folder} cannot be written (" in result.stderr and "File too large" in result.stderr
    assert re.search(r"; and \d+ more\)\.", result.stderr) and "[(" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_checkout", [False, True])
def test_the_example_starts_a_server_of_its_own(is_checkout: bool, tmp_path: Path) -> None:
    """In the demo's folder, and in a checkout."""
    folder = copy_demo(tmp_path / "demo")
    (folder / "config/model_config.yaml").write_text("model: {name: amalgam-demo, base_path: ../models/demo}\n")
    if is_checkout:
        shutil.copy(ROOT / "main.py", folder)
        (folder / "src").symlink_to(ROOT / "src")
    command = [sys.executable, "examples/test_expert_tracking.py", "--base-url", "http://127.0.0.1:9"]
    result = subprocess.run(
        [*command, "--max-new-tokens", "2"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("layer  expert  activations  of its layer") == 3


def test_the_site_links_to_nothing_that_it_does_not_have() -> None:
    docs, pages = ROOT / "docs", {ROOT / name for name in ("README.md", "README.zh-CN.md", "CHANGELOG.md")}
    left = []
    for path in sorted(docs.rglob("*.md")):
        for _, target in LINK.findall(without_links_out(path.read_text(encoding="utf-8"), path, docs)):
            leads_to = (path.parent / target).resolve()
            if ":" not in target and not leads_to.is_relative_to(docs) and leads_to not in pages:
                left.append((path.name, target))
    assert left == []
    monitored = (
        "See the [board](../deploy/monitoring/grafana/amalgam.json), [`Dockerfile`](../Dockerfile), [a](check.md)."
    )
    assert without_links_out(monitored, docs / "production.md", docs) == (
        "See the board (`deploy/monitoring/grafana/amalgam.json`), `Dockerfile`, [a](check.md)."
    )
