"""Grammars are tried in a process that may be lost at any moment, and what is said of one is never said of another."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from llguidance import LLMatcher

from amalgam.errors import UnavailableError
from amalgam.text import grammar_trial, rendering, sandbox
from amalgam.text.grammar import Grammar, GrammarCompiler
from amalgam.text.grammar_trial import Trial
from amalgam.text.parts import TokenizerParts
from amalgam.text.tokenizer import Tokenizer
from tests.text.processes import kill, running
from tests.text.tokenizer_files import LLAMA3, byte_level

TOKENS = [*(bytes([byte]) for byte in range(256)), b"\xff<end>"]
END = 256
DIGITS = str(LLMatcher.grammar_from_regex("[0-9]+"))
UNCLOSED = str(LLMatcher.grammar_from_regex("("))
HOSTILE = str(LLMatcher.grammar_from_json_schema(json.dumps({"type": "integer", "multipleOf": 9999991})))
SECONDS = 30.0


@pytest.fixture
def trial() -> Trial:
    return Trial(TOKENS, [END], [END])


@pytest.fixture
def processes() -> Callable[[], set[int]]:
    """Those that a test has started to try grammars, and that run still."""
    before = running(grammar_trial.__file__)
    return lambda: running(grammar_trial.__file__) - before


@contextmanager
def no_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_process_that_has_died_is_no_fault_of_the_next_grammar(
    trial: Trial, processes: Callable[[], set[int]]
) -> None:
    assert trial.run(DIGITS, SECONDS) == ""
    (pid,) = processes()
    kill(pid)
    assert trial.run(DIGITS, SECONDS) == ""


def test_an_interrupt_leaves_no_answer_behind(
    trial: Trial, processes: Callable[[], set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trial.run(DIGITS, SECONDS) == ""

    def interrupted() -> None:
        raise KeyboardInterrupt

    assert len(processes()) == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(select, "poll", interrupted)  # while the answer is waited for
        trial.run(DIGITS, SECONDS)
    assert not processes()
    assert trial.run(UNCLOSED, SECONDS)


def test_hostile_grammars_leave_nothing_behind_and_hold_up_nobody(
    trial: Trial, processes: Callable[[], set[int]]
) -> None:
    assert trial.run(DIGITS, SECONDS) == ""
    (pid,), num_finalizers = processes(), len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for _ in range(3):
        assert trial.run(HOSTILE, 0.05) is None
        assert trial.run(DIGITS, SECONDS) == ""
    assert processes() == {pid}  # it has not read the vocabulary again
    assert len(weakref.finalize._registry) == num_finalizers  # type: ignore[attr-defined]
    assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""


def test_time_in_which_a_processor_is_waited_for_does_not_count(
    trial: Trial, processes: Callable[[], set[int]]
) -> None:
    assert trial.run(DIGITS, SECONDS) == ""
    (pid,) = processes()
    is_done = threading.Event()

    def hold_up() -> None:
        while not is_done.wait(0.01):
            os.killpg(pid, signal.SIGSTOP)
            is_done.wait(0.1)
            os.killpg(pid, signal.SIGCONT)

    with ThreadPoolExecutor(1) as pool:
        held_up = pool.submit(hold_up)
        try:
            started = time.monotonic()
            while time.monotonic() - started < 0.5:
                assert trial.run(DIGITS, 0.08) == ""
        finally:
            is_done.set()
        held_up.result()


def test_blocked_signals_are_no_way_out() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGPROF])
    try:
        trial = Trial(TOKENS, [END], [END])
        assert trial.run(DIGITS, SECONDS) == ""
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert trial.run(HOSTILE, 0.05) is None


def test_without_descriptors_a_request_is_told_so_and_the_next_is_served() -> None:
    compiler = GrammarCompiler(Tokenizer(TokenizerParts(byte_level(LLAMA3)), frozenset()))
    for pid in running(sandbox.__file__):  # another is to be started
        kill(pid)
    with no_descriptors():
        with pytest.raises(UnavailableError):
            compiler.compile(Grammar("regex", "[0-9]+"))
        with pytest.raises(UnavailableError):
            rendering.render("{{ a }}", {"a": "b"})
    compiler.compile(Grammar("regex", "[0-9]+"))
    assert rendering.render("{{ a }}", {"a": "b"}) == "b"
