"""Threads that are inside an extension do not outlive the interpreter."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from amalgam.base.threads import StoppableThread, map_in_threads, stop_threads

ROOT = Path(__file__).parents[2]


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "src", capture_output=True, text=True, timeout=120, check=False
    )


# Half of the time inside a function of the extension that has given up the interpreter's lock.
INSIDE = """
import threading, torch
from amalgam.kernels.backends.cpu import elementwise, extension
from amalgam.base.threads import StoppableThread

torch.set_num_threads(1)
x, weight, stopped, runs = torch.ones(4000, 4096), torch.ones(4096), threading.Event(), threading.Event()

def work():
    while not stopped.is_set():
        elementwise.rms_norm(x, weight, 1e-6) if extension.is_available() else torch.mm(x[:256], x[:256].T)
        runs.set()

StoppableThread(work, "work", stopped.set).start()
assert runs.wait(60)
"""


def test_an_interpreter_that_ends_stops_what_computes() -> None:
    result = run(f"{INSIDE}raise SystemExit(7)")
    assert "terminate" not in result.stderr
    assert result.returncode == 7


def test_the_latest_thread_stops_first() -> None:
    order: list[str] = []
    threads = []
    for name in ("first", "second"):
        stopped = threading.Event()
        thread = StoppableThread(
            lambda name=name, stopped=stopped: (stopped.wait(60), order.append(name)), name, stopped.set
        )  # type: ignore[misc]
        thread.start()
        threads.append(thread)
    assert stop_threads(60)
    assert order == ["second", "first"]
    assert stop_threads(0)


def test_a_thread_that_does_not_stop_is_told() -> None:
    released = threading.Event()
    thread = StoppableThread(lambda: released.wait(60) and None, "stubborn", lambda: None)
    thread.start()
    assert not stop_threads(0.01)
    released.set()
    thread.join()
    assert stop_threads(0)


def test_results_are_in_the_order_of_the_items() -> None:
    assert map_in_threads(lambda number: number * 2, range(50), 4, "test") == list(range(0, 100, 2))
    assert map_in_threads(str, [], 4, "test") == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_first_error_leaves_out_what_has_not_begun(error: type[BaseException]) -> None:
    begun = []

    def work(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise error
        time.sleep(0.01)

    with pytest.raises(error):
        map_in_threads(work, range(10_000), 1, "test")
    assert len(begun) < 10_000
