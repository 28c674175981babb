"""How many threads a deployment computes with."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from amalgam.runtime import threads


def test_threads_are_those_of_the_cores_unless_somebody_says_less(
    monkeypatch: pytest.MonkeyPatch, use_threads: Callable[[int], None]
) -> None:
    monkeypatch.setattr(threads, "usable_threads", lambda: 6)
    use_threads(12)
    assert threads.choose_num_threads(None) == 6
    assert threads.choose_num_threads(9) == 9
    use_threads(4)
    assert threads.choose_num_threads(None) == 4
