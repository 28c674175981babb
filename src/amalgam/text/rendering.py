"""Chat templates rendered in processes of their own, which a template that does not end takes with it.

In: a template's source and variables. Out: its text. Must never know: what messages are.

A process starts when it is first needed (60 ms) and stays; it ends with this one, or with a template that goes beyond
the limits of `sandbox`, and then another takes its place.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from amalgam.errors import UnavailableError
from amalgam.text import sandbox

NUM_PROCESSES = 2


class TemplateError(Exception):
    """A template refuses what it is given, is wrong, or goes beyond the limits."""


def render(source: str, variables: Mapping[str, Any], mark: str = "") -> str:
    """What a template makes of JSON-like values. Any thread may call it.

    Args:
        mark: a character that filters leave as it is; empty: none.

    Raises:
        TemplateError: saying why there is no text.
        UnavailableError: the machine has no descriptors or memory left for a process.
    """
    asked = json.dumps({"source": source, "variables": variables, "mark": mark}).encode()
    answer = _processes.ask(asked)
    if answer is None:
        limits = f"{sandbox.CPU_SECONDS} s of computing and {sandbox.MAX_BYTES >> 20} MiB"
        raise TemplateError(f"it does not end, or takes more than {limits}")
    text = answer[1:].decode("utf-8", "surrogatepass")
    if answer[:1] == b"E":
        raise TemplateError(text)
    return text


class _Processes:
    def __init__(self) -> None:
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(NUM_PROCESSES):
            self._idle.put(None)  # to be started

    def ask(self, message: bytes) -> bytes | None:
        """The answer of the next process that is free; None: it has died of the message."""
        process = self._idle.get()
        try:
            if process is None or process.poll() is not None:
                process = _start()
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                sandbox.write_message(process.stdin, message)
            answer = sandbox.read_message(process.stdout)
            if answer is None:
                _end(process)
                process = None
            return answer
        except BaseException:
            if process is not None:
                _end(process)
            process = None
            raise
        finally:
            self._idle.put(process)

    def close(self) -> None:
        while not self._idle.empty():
            if (process := self._idle.get()) is not None:
                _end(process)


def _start() -> subprocess.Popen[bytes]:
    folders = {str(Path(spec.origin).parents[1]) for name in ("jinja2", "markupsafe")
               if (spec := find_spec(name)) is not None and spec.origin is not None}  # fmt: skip
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", sandbox.__file__, *sorted(folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for us
        )
    except OSError as error:
        raise UnavailableError(
            f"No process can be started to apply the chat template: {error}.", remedy="Try again later."
        ) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


_processes = _Processes()


def _forget() -> None:
    """A fork has copies of the pipes, which belong to the process that it was forked from."""
    global _processes
    _processes = _Processes()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: _processes.close())
