"""Standard streams that are closed, full, or cannot show a text: one line at most, an exit code, and no traceback."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import DEMO, ROOT

from amalgam.base.escaping import harmless
from amalgam.cli import main
from amalgam.cli.console import print_json, print_table, say, write
from amalgam.cli.streams import OutputError, guarded_streams

PLAN = ["plan", "--model", str(DEMO), "--all"]
GENERATE = ["generate", "明月几时有", "--model", str(DEMO), "--max-new-tokens", "8", "--seed", "1"]
VERBS = {
    "config": ["config"],
    "plan": PLAN,
    "plan as JSON": ["plan", "--model", str(DEMO), "--json"],
    "manifest": ["plan", "--model", str(DEMO), "--manifest"],
    "analyze": ["analyze", str(DEMO)],
    "estimate": ["estimate", "--model", str(DEMO)],
    "generate": GENERATE,
    "generate as JSON": [*GENERATE, "--json"],
    "experts": ["experts", "--prompt", "The sea", "--model", str(DEMO)],
}


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command line with `amalgam` in it, as a shell runs it."""
    program = f'amalgam() {{ "{sys.executable}" -m amalgam.cli "$@"; }}\n{command}'
    variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run(["bash", "-c", program], capture_output=True, env=variables, check=False, timeout=120)


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_line(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        code = main(VERBS[verb])
    err = capsys.readouterr().err
    assert code == 1
    assert [line for line in err.splitlines() if line.startswith("Error:")] == [
        f"Error: Cannot write to standard output: {os.strerror(28)}."
    ]
    assert "Traceback" not in err


@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_has_left_ends_it_quietly(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        code = main(VERBS[verb])
    err = capsys.readouterr().err
    assert code == 141 and "Error" not in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("verb", "encoding"), [*((verb, "latin-1") for verb in VERBS), ("generate", "ascii"), ("generate as JSON", "ascii")]
)
def test_what_an_encoding_lacks_is_escaped(verb: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", file)
    assert main(VERBS[verb]) == 0
    text = file.buffer.getvalue().decode(encoding)
    assert text.strip()
    assert file.errors == "strict"
    if verb == "generate":
        assert "\\u" in text
    if verb == "generate as JSON":
        assert json.loads(text)[0]["prompt"] == "明月几时有"


def test_closed_streams_are_no_place_for_other_files() -> None:
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        result = shell(f"amalgam config server.port {closed}")
        assert b"Traceback" not in result.stderr
        if closed == "2>&-" or closed == "<&-":
            assert (result.returncode, result.stderr) == (0, b"") and b"server.port" in result.stdout
        elif closed == ">&-":
            assert result.returncode == 1 and result.stderr.count(b"\n") == 1 and b"standard output" in result.stderr
        else:
            assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"")


def test_pipes_and_messages_of_real_processes() -> None:
    result = shell("set -o pipefail; amalgam config | head -c 1")
    assert (result.returncode, result.stderr) in ((141, b""), (0, b""))  # the latter if all was written in time
    result = shell("amalgam config > /dev/full")
    assert result.returncode == 1 and result.stderr.count(b"\n") == 1
    result = shell("amalgam config 2> /dev/full", AMALGAM_FOREIGN="1")
    assert result.returncode == 0 and b"server.port" in result.stdout
    result = shell("amalgam config server.nothing 2> /dev/full")
    assert result.returncode == 2
    result = shell("amalgam config model.name --model.name 月", PYTHONIOENCODING="latin-1")
    assert result.returncode == 0 and rb"\u6708" in result.stdout


def test_the_streams_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdin, sys.stdout, sys.stderr
    with pytest.raises(OutputError), open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr("sys.stdout", full)
        with guarded_streams():
            print("x" * 100_000)
    monkeypatch.undo()
    assert (sys.stdin, sys.stdout, sys.stderr) == before


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


FOREIGN = "a :smile: [red]b[/red] \x1b[31m\x07 \\[c] https://x.y 'q' {1} " + "long " * 60


def test_foreign_text_is_data(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    write(FOREIGN)
    assert out.getvalue() == FOREIGN
    out.truncate(out.seek(0))
    say(FOREIGN)
    print_table(["n:x:"], [[FOREIGN, "t\tb\n"]], FOREIGN)
    safe = FOREIGN.replace("\x1b", "\\x1b").replace("\x07", "\\x07")
    assert out.getvalue() == f"{safe}\n{safe}\nn:x:\n{safe}\tt\\tb\\n\n"


def test_a_terminal_is_not_steered_and_a_table_cuts_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    out = _Terminal()
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setenv("COLUMNS", "40")
    write(FOREIGN)
    assert out.getvalue() == harmless(FOREIGN) and ":smile: [red]b[/red]" in out.getvalue()
    assert "\x1b" not in out.getvalue() and "\x07" not in out.getvalue()
    out.truncate(out.seek(0))
    name = "model.layers.0.mlp.experts.17.down_proj.weight:smile:[b]"
    print_table(["weight", "x"], [[name, "1"]])
    lines = out.getvalue().splitlines()
    assert all(len(line) <= 40 for line in lines) and len(lines) > 5
    assert name in "".join(line.strip("│ ").split("│")[0].strip() for line in lines if line.startswith("│"))


def test_no_name_is_cut_in_a_pipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    assert main(PLAN) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert rows[0][0] == "weight" and len(rows) == 345 and {len(row) for row in rows} == {6}
    assert ["model.layers.5.mlp.experts.15.down_proj.weight", "base"] in [row[:2] for row in rows]


def test_json_is_json_whatever_the_strings_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding in ("utf-8", "ascii"):
        file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr("sys.stdout", file)
        for value in ({"path": "/\udcff/月😀", "list": [1, None]}, {"text": "月\x1b[2J\x9b31m\x7f"}):
            print_json(value)
            file.flush()
            written = file.buffer.getvalue()
            assert json.loads(written) == value
            assert not re.search(r"[^\n\x20-\x7e\xa0-\U0010ffff]", written.decode(encoding)), "what steers a terminal"
            file.buffer.seek(0)
            file.buffer.truncate()


def test_a_disk_that_is_full_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, os.strerror(28), str(tmp_path / "model.safetensors"))

    monkeypatch.setattr("amalgam.composition.quantize.make_checkpoint", full)
    assert main(["quantize", str(DEMO), str(tmp_path / "q"), "--format", "int8"]) == 1
    assert capsys.readouterr().err == f"Error: {os.strerror(28)}: '{tmp_path}/model.safetensors'.\n"


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_a_narrow_table_cuts_no_figure(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in pieces, on lines of their own: `20,139` as `20,1` and `39` would be two figures."""
    stdout = _Terminal()
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setenv("COLUMNS", str(width))
    columns = ("weights", "bits", "weights take", "in all", "fits", "sequences × tokens", "tok/s of one", "")
    sizes = ("4.5", "20,139.5 MiB", "123 GiB", "yes, 12.5 MiB to spare")
    cells = ("int4, groups of 32", *sizes, "32 × 4,096", "1234.5", "there")
    print_table(columns, [cells, cells], "What could run here")
    shown = stdout.getvalue()
    for figure in ("4.5", "20,139.5", "123", "12.5", "4,096", "1234.5"):
        assert len(re.findall(rf"(?<![\d.,]){re.escape(figure)}(?![\d.,])", shown)) == 2, shown
    lines = shown.splitlines()
    if width >= 80:
        assert all(len(line) <= width for line in lines) and "┃" in shown
    else:
        assert "tok/s of one: 1234.5" in lines and lines[0] == "What could run here"
