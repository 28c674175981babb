"""Processes that benchmarks start: asked one at a time, stopped meanwhile, and ended with the benchmark.

In: a contestant's script and its arguments. Out: seconds, as it measures them (`contestants/protocol.py`). Must never
know what is compared.

A contestant holds gigabytes, and a stopped one stays for good: signals that end this process go through the cleanup
(`exit_on_signals`), and a watcher ends contestants, and what they have started, when this process is killed.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

CONTESTANTS = Path(__file__).parent / "contestants"
READY_SECONDS = 900  # that a server may take
ENDING_SECONDS = 5  # that a failed engine may take to end, so that its log is whole
_CRASHES = (signal.SIGSEGV, signal.SIGILL, signal.SIGBUS)
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# How the log of an engine with workers names the one that an error is of; its own error only says that there was one.
_WORKERS_ERROR = re.compile(
    r"^\(\w+ pid=\d+\) (?:ERROR [^]]*\] )?((?:\w+\.)*\w*(?:Error|Exception): .*)$", re.MULTILINE
)
_WATCH = 'read -r _; kill -s KILL -- "-$0"'  # its input ends when whoever holds the other end has ended


@dataclass(frozen=True)
class Engine:
    """How to start a contestant: a script, its arguments, and the environment that it runs in (ours if empty).

    Attributes:
        model: a file or folder in the folder of models; the first argument unless empty.
        environment: a virtual environment in that folder, or an absolute path.
        options: further arguments, as they are.
        extra: scenarios that only it answers.
    """

    script: str
    model: str = ""
    environment: str = ""
    options: tuple[str, ...] = ()
    extra: tuple[tuple[str, int], ...] = ()

    def command(self, folder: Path) -> list[str]:
        python = str(folder / self.environment / "bin/python") if self.environment else sys.executable
        model = [str(folder / self.model)] if self.model else []
        return [python, str(CONTESTANTS / self.script), *model, *self.options]


class EngineError(RuntimeError):
    """An engine refuses its model, or has died; the message is the engine's own reason."""


def run(*command: str | Path, **variables: str) -> None:
    """Run a command to its end, its output on our standard error.

    Raises:
        CalledProcessError: it failed.
    """
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run([str(part) for part in command], check=True, env=os.environ | variables, stdout=sys.stderr)


def has_crashed(status: int | None) -> bool:
    """Whether a process died of an instruction or an address, by its exit status."""
    return status is not None and -status in _CRASHES


def exit_on_signals() -> None:
    """Leave by way of the cleanup at the signals that end a process, but for those that our parent has us ignore."""
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def process_memory(pid: int, field: str) -> int:
    """Bytes of a process by a field of its /proc/PID/status: VmRSS, VmHWM (the peak of it), RssAnon (no file's)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def reset_peak_memory(pid: int) -> None:
    """Have VmHWM count from now on."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


class Child:
    """A process group that ends with this process, however this one ends.

    Args:
        log: gets its standard error; and its output, unless that is read here.
        has_pipes: whether its standard input and output are read and written here.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        variables: Mapping[str, str] | None = None,
        *,
        has_pipes: bool = False,
        cwd: Path | None = None,
    ) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"} | dict(variables or {})
        environment.pop("PYTHONPATH", None)
        self._log = log
        self._is_closed = False
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE if has_pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if has_pipes else errors,
                stderr=errors,
                text=True,
                env=environment,
                cwd=cwd,
                start_new_session=True,
            )
        watch = ["/bin/sh", "-c", _WATCH, str(self.process.pid)]
        self._watcher = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)
        atexit.register(self.close)

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        """Ask again and again until it is ready; an OSError is a no. It is ended if it does not get there.

        Raises:
            RuntimeError: it has ended, or takes longer than `READY_SECONDS`.
        """
        deadline = time.monotonic() + READY_SECONDS
        try:
            while self.is_running and time.monotonic() < deadline:
                with suppress(OSError):
                    if is_ready():
                        return
                time.sleep(0.1)
            raise RuntimeError(f"It does not get ready:\n{self._log.read_text(errors='replace')[-3000:]}")
        except BaseException:
            self.close()
            raise

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._watcher.kill()  # first: afterwards another process may have the number
        self._watcher.wait()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # ends stopped processes too, and what a dead one has left
        self.process.wait()
        atexit.unregister(self.close)

    def _signal(self, number: signal.Signals) -> None:
        if self.is_running:
            os.killpg(self.process.pid, number)


class Contestant(Child):
    """A running engine that is stopped unless it is asked.

    Raises:
        EngineError: it cannot load its model.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        name = " ".join(filter(None, (engine.script, engine.model, *engine.options)))
        log = folder / f"{name.replace('/', '-').replace(' ', '-')}.log"
        super().__init__(engine.command(folder), log, has_pipes=True)
        if (first := self._reply()) != "ready":
            raise self._failed(first, "before it was ready")
        self.pause()

    def ask(self, scenario: str, size: int) -> float:
        """Seconds, as it measures them.

        Raises:
            EngineError: it has died.
        """
        assert self.process.stdin is not None
        self.resume()
        try:
            reply = ""
            with suppress(BrokenPipeError):
                self.process.stdin.write(f"{scenario} {size}\n")
                self.process.stdin.flush()
                reply = self._reply()
            if not reply:
                raise self._failed(reply, f"at {scenario} {size}")
            try:
                return float(reply)
            except ValueError:
                raise self._failed(reply, f"at {scenario} {size}") from None
        finally:
            self.pause()

    def _reply(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def _failed(self, reply: str, when: str) -> EngineError:
        """What is to be raised of an engine that does not answer, or answers that it cannot; it is ended."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_SECONDS)
        status = self.process.returncode
        self.close()
        log = self._log.read_text(errors="replace")
        return EngineError(f"{reason(reply, status, log, when)} (log: {self._log})")


def reason(reply: str, status: int | None, log: str, when: str) -> str:
    """Why an engine failed, in a line: what it says, what its workers say, or what ended it.

    Args:
        reply: `failed: why`, or empty if it said nothing.
        status: its exit status; None if it still runs.
    """
    if reply.startswith("failed: "):
        said = reply.removeprefix("failed: ")
        return next(iter(_WORKERS_ERROR.findall(log)), said)
    if status is not None and status < 0:
        return f"died of {signal.Signals(-status).name} {when}"
    if reply:
        return f"says {reply!r} {when}"
    if status is None:
        return f"does not answer {when}"
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "its log is empty")
    return f"ended {when}: {last}"


@contextmanager
def running(
    engines: Mapping[str, Engine], folder: Path, failures: dict[str, EngineError] | None = None
) -> Iterator[dict[str, Contestant]]:
    """Engines that are ready, and stopped.

    Args:
        failures: takes those that cannot load their models; without it the first one is raised.
    """
    with ExitStack() as cleanup:
        contestants = {}
        for name, engine in engines.items():
            try:
                contestants[name] = Contestant(engine, folder)
            except EngineError as error:
                if failures is None:
                    raise
                failures[name] = error
                continue
            cleanup.callback(contestants[name].close)
        yield contestants
