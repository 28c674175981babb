"""`amalgam chat`: a conversation that mistakes, interrupts and input that cannot be read do not end."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.conftest import DEMO, ROOT

from amalgam.cli import chat_input, main
from amalgam.cli.chat_input import InputError
from amalgam.cli.markdown import MarkdownWriter
from amalgam.engine.core import Engine
from amalgam.engine.params import SamplingParams
from amalgam.errors import UnavailableError
from amalgam.text.tokenizer import Tokenizer

FLAGS = ["chat", "--model", str(DEMO), "--temperature", "0", "--max-new-tokens", "6"]


class _Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.fixture
def conversations(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """What each answer was asked for with."""
    seen: list[list[dict[str, str]]] = []
    original = Tokenizer.encode_chat

    def encode_chat(tokenizer: Tokenizer, messages: Any, *limit: int, **options: Any) -> list[int]:
        seen.append(list(messages))
        return original(tokenizer, messages, *limit, **options)

    monkeypatch.setattr(Tokenizer, "encode_chat", encode_chat)
    return seen


def talk(data: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    monkeypatch.setattr("sys.stdin", _Stdin(data))
    code = main([*FLAGS, *flags])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def asked(conversations: list[list[dict[str, str]]]) -> list[str]:
    return [messages[-1]["content"] for messages in conversations]


def test_input_that_cannot_be_read_costs_its_line_only(
    conversations: list[list[dict[str, str]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_input, "MAX_LINE_BYTES", 64)
    data = b"Hello\nbad \xff\xfe line\n" + b"long " * 200 + b"\n\nWorld\r\nhalf \xe6\x9c\n" + "明月".encode()
    code, out, err = talk(data, capsys, monkeypatch)
    assert code == 0
    assert asked(conversations) == ["Hello", "World", "明月"]
    assert [len(messages) for messages in conversations] == [1, 3, 5]
    answers = [message["content"] for message in conversations[2] if message["role"] == "assistant"]
    assert all(answers) and out.startswith(answers[0].removesuffix("\n") + "\n" + answers[1])
    assert [int(number) for number in re.findall(r"Line (\d+) ", err)] == [2, 3, 6]
    assert err.count("tokens/s") == 3


def test_a_message_that_is_too_long_costs_itself_only(
    conversations: list[list[dict[str, str]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = b"Hello\n" + b"word " * 2000 + b"\nWorld\n"
    code, _, err = talk(data, capsys, monkeypatch, "--inference.max_seq_length", "128")
    assert code == 0 and err.count("Error: ") == 1
    assert [m["content"] for m in conversations[-1] if m["role"] == "user"] == ["Hello", "World"]


def test_commands_answer(
    conversations: list[list[dict[str, str]]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params: list[SamplingParams] = []
    submit = Engine.submit

    def watched(engine: Engine, ids: Any, given: SamplingParams, *more: Any) -> int:
        params.append(given)
        return submit(engine, ids, given, *more)

    monkeypatch.setattr(Engine, "submit", watched)
    lines = """/help
/set
/set temperature 0.5
/set top-k=7
/set max_new_tokens 2
/set seed 3
/set repetition_penalty 1.5
/set stop \\n
first
/set seed none
/set temprature 1
/set top_p 7
/set max_new_tokens many
/set do_sample perhaps
/nonsense
second
/set seed
/reset
//slashed
two\\
lines
/quit
never
"""
    code, _, err = talk(lines.encode(), capsys, monkeypatch, "--system", "Be brief.")
    assert code == 0
    shown = err.splitlines()
    for line in ("temperature = 0.5", "top_k = 7", "max_new_tokens = 2", "repetition_penalty = 1.5", "seed = none"):
        assert line in shown
    assert all(f"{name} = " in err for name in ("top_p", "min_p", "stop"))
    first, second = params[:2]
    assert (first.temperature, first.top_k, first.max_new_tokens, first.seed) == (0.5, 7, 2, 3)
    assert first.stop == ("\n",)
    assert (second.seed, second.top_p) == (None, first.top_p)
    errors = [line for line in shown if line.startswith("Error: ")]
    for part in ("temprature", "top_p", "'many'", "'perhaps'", "/nonsense"):
        assert sum(part in line for line in errors) == 1
    assert "temperature" in errors[0]
    assert asked(conversations) == ["first", "second", "/slashed", "two\nlines"]
    assert [m["content"] for m in conversations[2]] == ["Be brief.", "/slashed"]
    assert "/reset" in err and "/set NAME VALUE" in err


def test_a_conversation_can_be_told_how_to_behave_looked_into_and_kept(
    conversations: list[list[dict[str, str]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = f"""/save {tmp_path}/early.json
/experts
first
/system Be brief.
second
/system
/system none
third
/experts 3
/experts many
/save
/save {tmp_path}/chat.json
/save {tmp_path}/chat.json
/save {tmp_path}/chat.md
/save /dev/null/chat.md
"""
    code, _, err = talk(lines.encode(), capsys, monkeypatch, "--system", "Be kind.")
    assert code == 0
    assert [messages[0]["content"] for messages in conversations] == ["Be kind.", "Be brief.", "first"]
    assert [message["role"] for message in conversations[2]] == ["user", "assistant", "user", "assistant", "user"]
    assert err.count("System message: Be brief.") == 2 and "There is no system message." in err
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert saved["model"] == "demo" and saved["messages"][:5] == conversations[2]
    assert saved["messages"][5]["role"] == "assistant" and not (tmp_path / "early.json").exists()
    written = (tmp_path / "chat.md").read_text()
    assert written.startswith("# demo\n\n## user\n\nfirst\n\n## assistant\n\n")
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    for part in ("no conversation", "'many'", "no file", "chat.json' exists", "/dev/null/chat.md"):
        assert sum(part in line for line in errors) == 1
    assert len(errors) == 5
    assert "0 activations" in err and re.search(r"[1-9][\d,]* activations = .* 3 requests", err)


def test_markdown_is_laid_out_and_nothing_of_it_is_lost() -> None:
    text = """# A title

Two *words* <b>of</b> HTML :smile: [bold] \x1b[2J
and a second line

- one
- two [link](https://example.org/a_b)

| a | b |
|---|---|
| 1 | 2 |

```python
def f(x):
    return x
```
明月几时有？
把酒问青天。"""
    shown = set()
    for size in (1, 7, 10_000):
        for is_terminal in (True, False):
            console = Console(file=io.StringIO(), force_terminal=is_terminal, width=60, height=10, color_system=None)
            with MarkdownWriter(console) as writer:
                for start in range(0, len(text), size):
                    writer.write(text[start : start + size])
            raw = console.file.getvalue()  # type: ignore[attr-defined]
            assert "\x1b[2J" not in raw
            for part in ("A title", "Two words <b>of</b> HTML :smile: [bold] \\x1b[2J", "and a second line", "• one",
                         "https://example.org/a_b", "def f(x):", "明月几时有？", "把酒问青天。"):  # fmt: skip
                assert part in raw
            if not is_terminal:
                shown.add(raw)
    [final] = shown
    assert "```" not in final and "|--" not in final


def laid_out(text: str) -> str:
    console = Console(file=io.StringIO(), force_terminal=False, width=100)
    with MarkdownWriter(console) as writer:
        writer.write(text)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_addresses_and_entities_bring_no_controls_to_the_terminal() -> None:
    hostile = "<http://x/%1B%5B2J%C2%9B31m> [a](<http://x/%1b> 'b%1b&#27;') &#27;[2J &#155; &#13; `%1b`"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", laid_out(hostile))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("![a view](http://x/view.png)", ["a view", "http://x/view.png"]),
        ("As in [1].\n\n[1]: http://x/source\n", ["As in [1].", "[1]: http://x/source"]),
        ('[a link](http://x/ "and a title")', ["a link", 'http://x/ "and a title"']),
        ("one\u2028two\n\n```\nx = 1\n\ny = 2\n```\n\nend\n", ["one\u2028two", "x = 1", "y = 2", "end"]),
    ],
)
def test_what_markdown_would_leave_out_is_shown(text: str, parts: list[str]) -> None:
    shown = laid_out(text)
    assert all(part in shown for part in parts)
    assert "y = 2" not in shown or " y = 2" in shown, "code is one block"


def test_an_engine_that_is_gone_ends_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*_: Any) -> int:
        raise UnavailableError("The engine has stopped.")

    monkeypatch.setattr(Engine, "submit", submit)
    code, _, err = talk(b"Hello\nWorld\n", capsys, monkeypatch)
    assert code == 6 and err.count("The engine has stopped.") == 1


def test_no_template_is_said_before_the_first_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "has_chat_template", property(lambda _: False))
    code, _, err = talk(b"Hello\n", capsys, monkeypatch)
    assert code == 2 and "template" in err and "generate" in err


def test_the_history_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prompt_toolkit")
    file = tmp_path / "state" / "amalgam" / "chat_history"
    history = chat_input.private_history(file)
    for text in ("one", "two\nlines", "月", "lone \udcff"):
        history.store_string(text)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.write_bytes(file.read_bytes() + b"\xff broken\n[1]\n")
    assert list(history.load_history_strings()) == ["lone \udcff", "月", "two\nlines", "one"]
    monkeypatch.setattr(chat_input, "MAX_HISTORY_BYTES", 40)
    assert 0 < len(list(history.load_history_strings())) < 4
    nowhere = chat_input.private_history(Path("/dev/null/history"))
    nowhere.store_string("x")
    assert list(nowhere.load_history_strings()) == []


class _Screen:
    """A program in a terminal of its own, and what it has written there."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(slave)
        self.text = ""
        self._seen = 0

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 150) -> str:
        """Until new text matches; returns it."""
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern, re.DOTALL).search(self.text, self._seen)):
            assert time.monotonic() < deadline, (pattern, self.text[self._seen :])
            self._read()
        begin, self._seen = self._seen, found.end()
        return self.text[begin : found.end()]

    def _read(self) -> None:
        if select.select([self._master], [], [], 1)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # it has ended
                time.sleep(0.05)
                return
            self.text += re.sub(
                r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\x1b[=>]", "", data.decode(errors="replace")
            )

    def end(self) -> int:
        deadline = time.monotonic() + 150
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            self._read()
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        os.close(self._master)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[_Screen]:
    pytest.importorskip("prompt_toolkit")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TERM": "xterm-256color",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    arguments = [sys.executable, "-m", "amalgam.cli", *FLAGS, "--inference.max_seq_length", "4096"]
    running = _Screen(arguments, environment)
    yield running
    running.close()


def test_a_session_in_a_terminal(screen: _Screen, tmp_path: Path) -> None:
    screen.wait_for("/help lists.*>")
    screen.send("Hellx\x7fo there\r")  # a mistake, and backspace
    screen.wait_for(r"\+ \d+ tokens, [\d.]+ tokens/s.*>")
    screen.send("/set max_new_tokens 4000\r")
    screen.wait_for("max_new_tokens = 4000.*>")
    screen.send("/set min_tokens 3900\r")  # the answer is not over before Ctrl-C
    screen.wait_for("min_tokens = 3900.*>")
    screen.send("first\x1b\rsecond")  # Alt-Enter
    screen.wait_for("second")
    screen.send("\r")
    screen.wait_for(r"\n.*\w.*\n.*\w")  # the answer has begun
    screen.send("\x03")
    screen.wait_for("tokens/s.*>")
    screen.send("not sent")
    screen.wait_for("not sent")
    screen.send("\x03")  # clears the line
    screen.send("y")
    screen.wait_for("y")
    screen.send("\x7f")
    screen.send("\x1b[A")  # the last message again
    screen.wait_for("first.*second")
    screen.send("\x03")
    screen.send("\x03")
    screen.wait_for("once more.*>")
    screen.send("/set seed 5\r")
    screen.wait_for("seed = 5.*>")
    screen.send("\x04")
    assert screen.end() == 0
    assert "Traceback" not in screen.text and "WARNING" not in screen.text
    kept = (tmp_path / ".local" / "state" / "amalgam" / "chat_history").read_text()
    assert '"Hello there"' in kept and '"first\\nsecond"' in kept and "not sent" not in kept


def test_lines_that_go_on_end_with_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", _Stdin(b"a\\\nb\\"))
    lines = chat_input.open_input(None)
    assert (lines.read(), lines.read()) == ("a\nb", None)
    monkeypatch.setattr("sys.stdin", _Stdin(b"\xff"))
    with pytest.raises(InputError):
        chat_input.open_input(None).read()
