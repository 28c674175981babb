"""Grammars are tried in a process that may be lost at any moment, and what is said of one is never said of another."""

from __future__ import annotations

import json
import resource
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from llguidance import LLMatcher

from amalgam.errors import UnavailableError
from amalgam.text import grammar_trial, rendering
from amalgam.text.grammar import Grammar, GrammarCompiler
from amalgam.text.grammar_trial import Trial
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO

TOKENS = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]
END = 256
DIGITS = str(LLMatcher.grammar_from_regex("[0-9]+"))
UNCLOSED = str(LLMatcher.grammar_from_regex("("))
HOSTILE = str(LLMatcher.grammar_from_json_schema(json.dumps({"type": "integer", "multipleOf": 9999991})))
SECONDS = 30.0


@pytest.fixture
def trial() -> Trial:
    return Trial(TOKENS, [END], [END])


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_has_died_is_no_fault_of_the_next_grammar(trial: Trial) -> None:
    assert trial.run(DIGITS, SECONDS) == ""
    (process,) = trial._processes
    process.kill()
    process.wait()
    assert trial.run(DIGITS, SECONDS) == ""


def test_an_interrupt_leaves_no_answer_behind(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.run(DIGITS, SECONDS) == ""
    ask = grammar_trial._ask

    def interrupted(*args: object) -> None:
        ask(*args)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    (process,) = trial._processes
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grammar_trial, "_ask", interrupted)
        trial.run(DIGITS, SECONDS)
    assert process.poll() is not None
    assert trial.run(UNCLOSED, SECONDS)


def test_hostile_grammars_leave_nothing_behind_and_hold_up_nobody(trial: Trial) -> None:
    assert trial.run(DIGITS, SECONDS) == ""
    processes, num_finalizers = trial._processes[:], len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for _ in range(3):
        assert trial.run(HOSTILE, 0.05) is None
        assert trial.run(DIGITS, SECONDS) == ""
    assert trial._processes == processes  # it has not read the vocabulary again
    assert len(weakref.finalize._registry) == num_finalizers  # type: ignore[attr-defined]
    (process,) = processes
    assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() == ""


def test_blocked_signals_are_no_way_out() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        trial = Trial(TOKENS, [END], [END])
        assert trial.run(DIGITS, SECONDS) == ""
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert trial.run(HOSTILE, 0.05) is None


def test_without_descriptors_a_request_is_told_so_and_the_next_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = GrammarCompiler(Tokenizer.load(DEMO))
    monkeypatch.setattr(rendering, "_processes", rendering._Processes())
    with no_descriptors():
        with pytest.raises(UnavailableError):
            compiler.compile(Grammar("regex", "[0-9]+"))
        with pytest.raises(UnavailableError):
            rendering.render("{{ a }}", {"a": "b"})
    compiler.compile(Grammar("regex", "[0-9]+"))
    assert rendering.render("{{ a }}", {"a": "b"}) == "b"
