"""`amalgam generate`: raw text, as it comes, and what there is of it when it is interrupted."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from tests.cli.verb import run_verb
from tests.conftest import DEMO, ROOT

from amalgam.cli import INTERRUPTED, console, main
from amalgam.engine.core import Engine
from amalgam.engine.request import FinishReason, RequestOutput
from amalgam.errors import AmalgamError, RequestError
from amalgam.llm import LLM, SamplingParams
from amalgam.tools.journal import Journal

ARGUMENTS = ["--model", str(DEMO), "--temperature", "0", "--max-new-tokens"]
PROMPTS = ["The old man looked", "def main(", "明月几时有"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """What the model answers to the prompts."""
    with LLM(model=DEMO) as llm:
        return [answer.text for answer in llm.generate(PROMPTS, SamplingParams(max_new_tokens=40, do_sample=False))]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["generate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_one_answer_is_its_text_and_nothing_else(texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, text in zip(PROMPTS, texts, strict=True):
        code, out, err = run(capsys, prompt, *ARGUMENTS, "40")
        assert code == 0
        assert out == text.removesuffix("\n") + "\n"
        assert "tokens/s" in err


def test_several_answers_are_told_apart(texts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *PROMPTS, *ARGUMENTS, "40")
    expected = [f"==> {prompt} <==\n{text}".rstrip("\n") for prompt, text in zip(PROMPTS, texts, strict=True)]
    assert (code, out) == (0, "\n\n".join(expected) + "\n")


def test_markup_and_long_lines_pass_through(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = [":smile: [bold]x[/bold] ", "\x1b[2J\r", "word " * 100, "https://example.org/a_b"]
    monkeypatch.setattr(Engine, "generate", answering({0: pieces}))
    code, out, _ = run(capsys, "a prompt", *ARGUMENTS, "4")
    assert (code, out) == (0, "".join(pieces) + "\n")


@pytest.mark.parametrize(("flag", "source"), [("--regex", "("), ("--json-schema", '{"type": "objekt"}')])
def test_a_malformed_grammar_is_refused_before_the_model_is_opened(
    flag: str, source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(source)
    given = source if flag == "--regex" else str(tmp_path / "schema.json")
    code, out, err = run(capsys, "a prompt", flag, given, "--model", str(tmp_path / "none"))
    assert (code, out) == (RequestError.exit_code, "")
    assert flag.removeprefix("--").replace("-", "_") in err and str(tmp_path / "none") not in err


def answering(pieces: dict[int, list[str]], error: Exception | None = None, failing: int = 0) -> Callable[..., None]:
    """An engine that answers prompt by prompt, a token of each in turns, the last prompt first."""

    def generate(
        _: Engine, prompts: list[list[int]], params: SamplingParams, *, watch: Callable[..., None], constraint: None
    ) -> None:
        for number in range(max(map(len, pieces.values()))):
            for index in sorted(pieces, reverse=True):
                if number < len(pieces[index]):
                    is_last = number == len(pieces[index]) - 1
                    failed = error if is_last and index == failing else None
                    reason = (FinishReason.ERROR if failed else FinishReason.STOP) if is_last else None
                    watch(index, RequestOutput(index, pieces[index][number], (0,), reason, failed))

    return generate


def test_text_is_written_as_it_comes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = console.write
    monkeypatch.setattr("amalgam.cli.console.write", lambda text: (seen.append(text), original(text)))
    monkeypatch.setattr(Engine, "generate", answering({0: ["a", "b", "c"], 1: ["x", "y", "z"]}))
    code, out, _ = run(capsys, "p", "q", *ARGUMENTS, "3")
    assert code == 0
    assert seen == ["a", "b", "c", "\n", "xyz", "\n"]
    assert out == "==> p <==\nabc\n\n==> q <==\nxyz\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_keeps_what_has_come(
    as_json: bool, texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, begun = Engine.generate, set[int]()

    def interrupted(
        engine: Engine,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        watch: Callable[..., None],
        constraint: None,
    ) -> None:
        def count(index: int, output: RequestOutput) -> None:
            watch(index, output)
            begun.update([index] if output.text else [])
            if len(begun) == 2:
                raise KeyboardInterrupt

        original(engine, prompts, params, watch=count)

    monkeypatch.setattr(Engine, "generate", interrupted)
    code, out, err = run(capsys, *PROMPTS[:2], *ARGUMENTS, "4000", *(["--json"] if as_json else []))
    assert code == 130 and "Interrupted" in err and "Traceback" not in err
    if as_json:
        answers = json.loads(out)
        assert [answer["finish_reason"] for answer in answers] == ["cancelled", "cancelled"]
        shown = [answer["generated_text"] for answer in answers]
    else:
        first, second = out.removesuffix("\n").split("\n\n==> def main( <==\n")
        shown = [first.removeprefix(f"==> {PROMPTS[0]} <==\n"), second]
    for text, whole in zip(shown, texts[:2], strict=True):
        assert text and whole.startswith(text) and len(text) < len(whole)


@pytest.mark.parametrize("as_json", [False, True])
def test_one_that_fails_costs_no_other(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from amalgam.errors import UnavailableError

    pieces = {0: ["a", ""], 1: ["x", "y", "z"]}
    monkeypatch.setattr(Engine, "generate", answering(pieces, UnavailableError("It broke."), failing=0))
    code, out, err = run(capsys, "p", "q", *ARGUMENTS, "3", *(["--json"] if as_json else []))
    assert code == 6 and "It broke." in err
    if as_json:
        assert [(a["generated_text"], a.get("error")) for a in json.loads(out)] == [("a", "It broke."), ("xyz", None)]
    else:
        assert out == "==> p <==\na\n\n==> q <==\nxyz\n"


def test_the_model_s_own_defaults_hold_where_no_flag_is_given(
    texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    (model / "generation_config.json").write_text(json.dumps({"do_sample": False, "max_new_tokens": 7}))
    code, out, err = run(capsys, PROMPTS[0], "--model", str(model))
    assert code == 0 and " + 7 tokens" in err
    assert texts[0].startswith(out.removesuffix("\n"))
    code, _, err = run(capsys, PROMPTS[0], "--model", str(model), "--max-new-tokens", "3")
    assert code == 0 and " + 3 tokens" in err


def test_a_prompt_that_is_no_unicode_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "a\udcff", *ARGUMENTS, "2")
    assert (code, out) == (2, "") and "surrogate" in err


def test_a_wide_terminal_and_a_narrow_one_get_the_same_text(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("sys.stdout", Terminal())
    assert main(["generate", PROMPTS[0], *ARGUMENTS, "40"]) == 0
    import sys

    assert sys.stdout.getvalue() == texts[0].removesuffix("\n") + "\n"  # type: ignore[attr-defined]


def run_until_killed(log: Path, arguments: tuple[str, ...], num_answers: int) -> None:
    """The verb, killed as it is about to write one more answer than so many."""
    add, num_left = Journal.add, num_answers

    def add_some(journal: Journal, item: int, value: Mapping[str, Any]) -> None:
        nonlocal num_left
        if not num_left:
            os.kill(os.getpid(), signal.SIGKILL)
        num_left -= 1
        add(journal, item, value)

    Journal.add = add_some  # type: ignore[method-assign]
    run_verb(log, arguments)


def test_a_file_of_lines_survives_a_kill(
    tmp_path: Path, context: ForkServerContext, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there after two kills and a third run is what one run gives."""
    chat = {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hello"}]}}
    response = {"url": "/v1/responses", "body": {"input": "Hello"}}
    lines = [
        json.dumps(f"{PROMPTS[i % 3]} {i}" if i % 4 else (response if i % 8 else chat) | {"custom_id": f"{i}"})
        for i in range(30)
    ]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "", "{broken"]))
    flags = ["--seed", "7", "--max-new-tokens", "12", "--inference.max_batch_size", "4", "--engine.num_threads", "1"]
    flags += ["--input", str(tmp_path / "in.jsonl"), "--model", str(DEMO), "--output"]
    journal = tmp_path / "killed.jsonl.partial"
    for num_answers in (7, 9):
        arguments = (tmp_path / "log", ("generate", *flags, str(tmp_path / "killed.jsonl")), num_answers)
        process = context.Process(target=run_until_killed, args=arguments)
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    num_kept = 7 + 9
    assert journal.read_bytes().count(b"\n") == 2 + num_kept  # and the lines that say what the run is of
    for name in ("killed", "whole"):
        code, out, err = run(capsys, *flags, str(tmp_path / f"{name}.jsonl"), "--json")
        assert code == 0
        totals = json.loads(out)
        assert (totals["num_lines"], totals["num_answered"], totals["num_errors"]) == (32, 30, 2)
        assert totals["num_resumed"] == (num_kept if name == "killed" else 0)
    killed, whole = ([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
                     for name in ("killed", "whole"))  # fmt: skip
    for line in [*killed, *whole]:
        if line.get("response"):
            for name in ("created", "created_at", "completed_at"):
                line["response"]["body"].pop(name, None)
    assert killed == whole
    code, _, err = run(capsys, *flags, str(tmp_path / "whole.jsonl"))
    assert code == 5 and "whole.jsonl" in err


def test_every_exit_code_of_a_run_is_in_the_page() -> None:
    """Those of all errors that a user can cause, as any of them may end it."""

    def codes(kind: type[AmalgamError]) -> set[int]:
        return {kind.exit_code}.union(*map(codes, kind.__subclasses__()))

    page = (ROOT / "docs" / "offline.md").read_text()
    table = page.partition("| exit code | |\n|---|---|\n")[2].partition("\n\n")[0]
    told = {int(line.split("|")[1]) for line in table.splitlines()}
    assert told == codes(AmalgamError) | {0, 1, INTERRUPTED}


class _Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def test_a_prompt_is_read_from_standard_input(
    texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `echo` ends its line with is no part of the prompt."""
    monkeypatch.setattr("sys.stdin", _Stdin(f"{PROMPTS[0]}\n".encode()))
    code, out, _ = run(capsys, "-", *ARGUMENTS, "40")
    assert code == 0 and out == texts[0].removesuffix("\n") + "\n"


@pytest.mark.parametrize(
    ("data", "prompts", "named"), [(b"", ["-"], "stdin"), (b"\xff", ["-"], "UTF-8"), (b"x", ["-", "a", "-"], "2")]
)
def test_standard_input_that_is_no_prompt(
    data: bytes, prompts: list[str], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", _Stdin(data))
    code, out, err = run(capsys, *prompts, *ARGUMENTS, "40")
    assert (code, out) == (2, "") and named in err
