"""Engines as processes that are asked one at a time, stopped meanwhile, and ended with the process that started them.

In: a contestant's script and its arguments. Out: seconds, as it measures them (`contestants/protocol.py`). Must never
know what is compared.

A contestant holds gigabytes, and a stopped one stays for good: signals that end this process go through the cleanup
(`exit_on_signals`), and on Linux the kernel kills contestants when this process is killed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

CONTESTANTS = Path(__file__).parent / "contestants"
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Engine:
    """How to start a contestant: a script, its argument, and the environment that it runs in (ours if empty).

    Attributes:
        options: further arguments, as they are.
        extra: scenarios that only it answers.
    """

    script: str
    argument: str
    environment: str = ""
    options: tuple[str, ...] = ()
    extra: tuple[tuple[str, int], ...] = ()


def exit_on_signals() -> None:
    """Leave by way of the cleanup at the signals that end a process, but for those that our parent has us ignore."""
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent has ended, even by SIGKILL and while this one is stopped."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)


class Contestant:
    """A running engine that is stopped unless it is asked."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self._name = " ".join((engine.script, engine.argument, *engine.options))
        log = folder / f"{self._name.replace('/', '-').replace(' ', '-')}.log"
        model = folder / engine.argument
        environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}
        environment.pop("PYTHONPATH", None)
        python = str(folder / engine.environment / "bin/python") if engine.environment else sys.executable
        us = os.getpid()
        self._process = subprocess.Popen(
            [
                python,
                str(CONTESTANTS / engine.script),
                str(model) if engine.environment else engine.argument,
                *engine.options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: _end_with(us),
        )
        atexit.register(self.close)
        if (first := self._reply()) != "ready":
            self.close()
            raise RuntimeError(f"{self._name}: {first or 'died'}; see {log}")
        self._signal(signal.SIGSTOP)

    def ask(self, scenario: str, size: int) -> float:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(f"{scenario} {size}\n")
            self._process.stdin.flush()
            reply = self._reply()
            if not reply:
                raise RuntimeError(f"{self._name} died at {scenario} {size}; its log is in the folder")
            return float(reply)
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        self._signal(signal.SIGKILL)  # which ends stopped processes too
        self._process.wait()
        atexit.unregister(self.close)

    def _reply(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)


@contextmanager
def running(engines: dict[str, Engine], folder: Path) -> Iterator[dict[str, Contestant]]:
    with ExitStack() as cleanup:
        contestants = {}
        for name, engine in engines.items():
            contestants[name] = Contestant(engine, folder)
            cleanup.callback(contestants[name].close)
        yield contestants
