"""Whether a grammar can be followed at all, found out in a process that can be killed.

In: lines of JSON, first a vocabulary, then grammars. Out: for each a line with what is wrong with it. Must never know:
anything else of this package. It runs as a file of its own.

llguidance's limits do not bound what a hostile grammar takes: `{"type": "integer", "multipleOf": 9999991}` is compiled
for minutes, in a call that cannot be interrupted. Here it ends with its process: a copy of one that has read the
vocabulary, which takes seconds and so happens once.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any
from weakref import finalize

MAX_MASK_SECONDS = 0.1  # of processor time; everyone in a step waits for the slowest mask
_NUM_STEPS = 24  # of one answer that is tried
_MAX_MEMORY_BYTES = 2**30
_MAX_FAULT_BYTES = 2**12  # a pipe takes them at once
_START_SECONDS = 60.0
_WAITING_SECONDS = 5.0  # that a copy may wait for a processor
_SLACK_SECONDS = 5.0 + _WAITING_SECONDS  # on a busy machine, to end a copy and to answer

Encode = Callable[[bytes], list[int]]  # how a tokenizer writes a text


class Trial:
    """A process that tries grammars, one after another. Started when needed, and again if it has been lost.

    Args:
        tokens: the bytes of each token; special ones begin with 0xFF.
    """

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_ids: Sequence[int]) -> None:
        text = base64.b64encode(b"".join(tokens)).decode()
        lengths = [len(token) for token in tokens]
        vocabulary = {"bytes": text, "lengths": lengths, "special_ids": [*special_ids], "eos_ids": [*eos_ids]}
        self._first_line = json.dumps({"path": sys.path, **vocabulary}).encode() + b"\n"
        self._lock = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []  # one, or none
        finalize(self, _end, self._processes)

    def run(self, grammar: str, seconds: float) -> str | None:
        """What is wrong with a grammar; "" if nothing is, None if it was not found out in time or in memory.

        Args:
            seconds: of processor time.

        Raises:
            OSError: no process can be started, or it has been lost on the way.
        """
        with self._lock:
            if not self._processes or self._processes[0].poll() is not None:
                self._start()
            try:
                question = json.dumps({"grammar": grammar, "seconds": seconds}).encode() + b"\n"
                fault: str | None = _ask(self._processes[0], question, seconds + _SLACK_SECONDS)
            except BaseException:  # an interrupt, perhaps: the next grammar would get this one's answer
                _end(self._processes)
                raise
            return fault

    def _start(self) -> None:
        _end(self._processes)
        process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt at the terminal is not for it
        )
        self._processes.append(process)
        try:
            _ask(process, self._first_line, _START_SECONDS)
        except BaseException:
            _end(self._processes)
            raise


def _ask(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    waiting = select.poll()
    waiting.register(process.stdout, select.POLLIN)
    answer = process.stdout.readline() if waiting.poll(1000 * seconds) else b""
    if not answer:
        raise OSError("the process that tries grammars gives no answer")
    return json.loads(answer)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    while processes:
        process = processes.pop()
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.wait()


class Vocabulary:
    """Tokens as llguidance wants them."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_id: int, encode: Encode | None) -> None:
        self.tokens = tokens
        self.special_token_ids = special_ids
        self.eos_token_id = eos_id
        self._encode = encode

    def __call__(self, text: bytes) -> list[int]:
        """How the tokenizer writes a text; where it would write another before it, the longest tokens one by one."""
        token_ids = [] if self._encode is None else list(self._encode(text))
        if b"".join(self.tokens[token_id] for token_id in token_ids) == text:
            return token_ids
        longest = max(map(len, self._ids))
        place, token_ids = 0, []
        while place < len(text):
            ends = range(min(len(text), place + longest), place, -1)
            end = next((end for end in ends if text[place:end] in self._ids), 0)
            if not end:
                return []
            token_ids.append(self._ids[text[place:end]])
            place = end
        return token_ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        return {token: token_id for token_id, token in enumerate(self.tokens) if token}


def make_tokenizer(
    tokens: Sequence[bytes], special_ids: Sequence[int], eos_ids: Sequence[int], encode: Encode | None
) -> Any:
    """llguidance's `LLTokenizer`."""
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(Vocabulary(tokens, special_ids, eos_ids[0], encode))
    return LLTokenizer(wrapped, n_vocab=len(tokens), eos_token=list(eos_ids))


def make_matcher(tokenizer: Any, grammar: str) -> Any:
    """llguidance's `LLMatcher`."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(max_grammar_size=100_000, verbose_errors=False)
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def _fault(tokenizer: Any, grammar: str) -> str:
    matcher = make_matcher(tokenizer, grammar)
    choose = random.Random(0)
    for _ in range(_NUM_STEPS):
        if matcher.is_error():
            break
        before = time.process_time()
        mask = matcher.compute_bitmask()
        if time.process_time() - before > MAX_MASK_SECONDS:
            return "it takes too long to follow"
        if matcher.is_error() or matcher.is_stopped():
            break
        places = [index for index, byte in enumerate(mask) if byte]
        if not places:
            break
        place = choose.choice(places)
        bit = choose.choice([bit for bit in range(8) if mask[place] >> bit & 1])
        if 8 * place + bit in tokenizer.eos_tokens or not matcher.consume_token(8 * place + bit):
            break
    return str(matcher.get_error()) if matcher.is_error() else ""


def _tried(tokenizer: Any, grammar: str, seconds: float) -> str | None:
    """`_fault`, found out by a copy of this process; None: it takes too long, or too much memory.

    Args:
        seconds: of processor time, so that a busy machine does not have a simple grammar refused.
    """
    readable, writable = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # whose signal ends the process
            signal.setitimer(signal.ITIMER_REAL, seconds + _WAITING_SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY_BYTES, _MAX_MEMORY_BYTES))
            os.write(writable, _fault(tokenizer, grammar).encode()[:_MAX_FAULT_BYTES])
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writable)
    with open(readable, "rb") as pipe:
        fault = pipe.read()
    _, status = os.waitpid(pid, 0)
    return None if status else fault.decode(errors="replace")


def main() -> None:
    """Serve on the standard input and output."""
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, signal.SIG_DFL)  # whoever starts this may ignore or block it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGPROF, signal.SIGALRM])
    given = json.loads(sys.stdin.buffer.readline())
    sys.path[:] = given["path"]
    whole, tokens, place = base64.b64decode(given["bytes"]), [], 0
    for length in given["lengths"]:
        tokens.append(whole[place : place + length])
        place += length
    tokenizer = make_tokenizer(tokens, given["special_ids"], given["eos_ids"], None)
    answer: str | None = ""
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        answer = _tried(tokenizer, **json.loads(line))


if __name__ == "__main__":
    os.nice(5)
    main()
