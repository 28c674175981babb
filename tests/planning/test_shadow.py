"""How much of the time comparing two plans takes: by clocks that a test sets."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from amalgam.planning.shadow import Throttle


def test_each_thread_rests_for_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {threading.get_ident(): 1000.0}  # it has computed for so long before
    waits: list[float] = []
    clock = SimpleNamespace(thread_time=lambda: clocks[threading.get_ident()])
    monkeypatch.setattr("amalgam.planning.shadow.time", clock)
    throttle = Throttle(0.1, lambda: None, waits.append)

    def load() -> None:
        for seconds in (0.5, 0.7):
            clocks[threading.get_ident()] = seconds
            throttle("Loading weights", 1, 2)

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    clocks[threading.get_ident()] = 1000.3
    throttle("Computing", 1, 1)
    assert waits == pytest.approx([4.5, 1.8, 2.7])
