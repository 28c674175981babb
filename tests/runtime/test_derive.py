"""Derived sources are made once, by one process."""

from __future__ import annotations

import threading
from pathlib import Path

from amalgam.config.settings import build_settings
from amalgam.runtime.derive import ensure_derived
from tests.conftest import DEMO


def test_of_two_first_starts_one_makes_the_sources_and_the_other_waits(tmp_path: Path) -> None:
    mixed = {"int4_path": str(tmp_path / "int4"), "derived": {"int4": {"format": "int4", "group_size": 32}}}
    settings = build_settings({"model": {"base_path": str(DEMO), "mixed_precision": mixed}})
    has_begun, is_waited_for = threading.Event(), threading.Event()
    num_made: list[int] = []

    def slow(what: str, done: int, total: int) -> None:
        has_begun.set()
        assert is_waited_for.wait(60)

    def impatient(what: str, done: int, total: int) -> None:
        assert "int4" in what and done == 0
        is_waited_for.set()

    first = threading.Thread(target=lambda: num_made.append(len(ensure_derived(settings, slow))))
    first.start()
    assert has_begun.wait(60)
    assert ensure_derived(settings, impatient) == []
    first.join()
    assert num_made == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"int4"}
