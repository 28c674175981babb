"""Every command in both READMEs runs and answers."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from amalgam.cli import main
from tests.conftest import ROOT

READMES = ("README.md", "README.zh-CN.md")
ADDRESS = "http://127.0.0.1:8080"


# Requests without a seed of their own get the same ones each time: an answer by chance may be empty.
SERVER = """
import random, runpy
from types import SimpleNamespace
from amalgam.engine import core
core.secrets = SimpleNamespace(randbelow=random.Random(0).randrange)
runpy.run_path("main.py", run_name="__main__")
"""


def commands(name: str, language: str = "bash") -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()] if language == "bash" else blocks


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """What `make serve` runs, on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, "--config", "config/model_config.yaml", "--port", "0"],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    address = None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            address = found[0]
            break
    assert address, "the server names its address"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{address}/ready", timeout=5)
            break
        except OSError:
            time.sleep(0.2)
    yield address
    process.terminate()
    assert process.wait(60) == 0


def test_both_languages_show_the_same_commands() -> None:
    assert len(commands(READMES[0])) == len(commands(READMES[1])) > 10
    shapes = [
        [re.sub(r'"(prompt|content)": "[^"]*"|"[^"]*"$', "…", line) for line in commands(name)] for name in READMES
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", READMES)
def test_speeds_are_those_of_the_table(name: str) -> None:
    """Who measures again and changes the table changes the READMEs."""
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition("**amalgam int4**")[2]
    ratios = re.search(r"^\| ratio \|(.*)\|$", table, re.MULTILINE)
    assert ratios is not None
    _, prompt, *decoding = (re.findall(r"[\d.]+", cell)[0] for cell in ratios[1].split("|"))
    told = re.findall(r"\d+\.\d\d", (ROOT / name).read_text(encoding="utf-8").partition("Zen 4")[2])
    assert told == [*decoding, prompt]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in READMES:
        for line in commands(name):
            if line.startswith("make "):
                assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE), line


@pytest.mark.parametrize("name", READMES)
def test_requests(name: str, server: str) -> None:
    curls = [line for line in commands(name) if line.startswith("curl")]
    assert len(curls) == 7
    for line in curls:
        words = shlex.split(line.replace(ADDRESS, server))
        result = subprocess.run([*words, "--silent", "--fail-with-body"], capture_output=True, text=True, check=False)
        assert result.returncode == 0, (line, result.stdout)
        if "-N" in words:
            assert result.stdout.rstrip().endswith("[DONE]")
            continue
        answer = json.loads(result.stdout)
        if words[1].endswith("/generate"):
            assert answer["generated_text"].strip()
        if words[1].endswith("/v1/messages"):
            assert answer["content"][0]["text"].strip()


def test_local_commands(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    lines = [line for name in READMES for line in commands(name) if line.startswith(".venv/bin/")]
    assert len(lines) == 28
    for line in dict.fromkeys(lines):
        program, *words = shlex.split(line.replace("/tmp/", f"{tmp_path}/").replace(ADDRESS, server))
        where = {
            "examples/test_expert_tracking.py": ["--base-url", server],
            "experts": ["--url", server],
            "remap": ["--url", server],
        }
        words += where.get(words[0], [])
        if program == ".venv/bin/python":
            command = [sys.executable, *words]
            result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
            code, out, err = result.returncode, result.stdout, result.stderr
        else:
            assert program == ".venv/bin/amalgam"
            code = main(words)
            out, err = capsys.readouterr()
        assert code == 0, (line, err)
        assert out.strip(), line


def output_of(program: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a program prints; run here, since another interpreter would import everything again."""
    (folder / "program.py").write_text(program, encoding="utf-8")
    runpy.run_path(str(folder / "program.py"), run_name="__main__")
    return capsys.readouterr().out


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The programs of both languages, one after the other."""
    monkeypatch.chdir(ROOT)
    programs = [program for name in READMES for program in commands(name, "python") if "LLM" in program]
    assert len(programs) == 2
    printed = "print(answer.text); print('length', len(answer.text.strip()))"
    found = output_of("\n".join(programs).replace("print(answer.text)", printed), tmp_path, capsys)
    assert "layer_id" in found
    lengths = [int(number) for number in re.findall(r"^length (\d+)$", found, re.MULTILINE)]
    assert len(lengths) == 4 and min(lengths) > 20, "answers that are worth showing"


@pytest.mark.parametrize("name", READMES)
def test_client(name: str, server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The program with OpenAI's client, whose answer comes as a stream."""
    (program,) = [program for program in commands(name, "python") if "OpenAI" in program]
    assert output_of(program.replace(ADDRESS, server), tmp_path, capsys).strip()


@pytest.mark.parametrize("name", READMES)
def test_configuration(name: str) -> None:
    import yaml

    from amalgam.config.settings import build_settings

    (text,) = commands(name, "yaml")
    settings = build_settings(yaml.safe_load(text))
    assert set(settings.model.mixed_precision.sources) == {"fp8", "int4"}
