"""What the benchmarks start ends with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A contestant, and a process that it started, as engines with workers do.
CONTESTANT = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=-3, stdout=-3, stderr=-3)
with open(sys.argv[1], "w") as file:
    file.write(f"{os.getpid()} {worker.pid}")
if sys.argv[2] == "ready":
    print("ready", flush=True)
time.sleep(600)
"""
BENCHMARK = """
import sys, time
from pathlib import Path
from benchmarks import engines
folder = Path(sys.argv[1])
engines.CONTESTANTS = folder
engines.exit_on_signals()
contestants = {name: engines.Engine("contestant.py", options=(str(folder / name), state))
               for name, state in (("first", "ready"), ("second", sys.argv[2]))}
with engines.running(contestants, folder):
    (folder / "all").touch()
    time.sleep(600)
"""


def is_running(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a worker whose parent is gone waits for init to reap it


def process_ids(file: Path, deadline: float) -> list[int]:
    while time.monotonic() < deadline:
        if file.exists() and len(found := file.read_text().split()) == 2:
            return [int(text) for text in found]
        time.sleep(0.01)
    raise TimeoutError(file)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("state", ["ready", "loading"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL])
def test_contestants_end_with_the_comparison(tmp_path: Path, number: signal.Signals, state: str) -> None:
    """Also those that are stopped, one that is loading, and the processes that they have started."""
    (tmp_path / "contestant.py").write_text(CONTESTANT)
    process = subprocess.Popen([sys.executable, "-c", BENCHMARK, str(tmp_path), state], cwd=ROOT)
    started: list[int] = []
    try:
        deadline = time.monotonic() + 60
        first, second = (process_ids(tmp_path / name, deadline) for name in ("first", "second"))
        started = [*first, *second]
        while state == "ready" and not (tmp_path / "all").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        process.wait(60)
        while any(map(is_running, started)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
        for process_id in filter(is_running, started):
            os.kill(process_id, signal.SIGKILL)
