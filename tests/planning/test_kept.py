"""Sensitivities that are on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from amalgam.planning.problem import Problem
from amalgam.planning.sensitivity import VERSION, errors_on_disk, file_of


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"version": %d}',
        '{"version": %d, "weights": []}',
        '{"version": %d, "weights": null}',
        '{"version": %d, "weights": {}}',
    ],
)
def test_a_damaged_file_is_as_good_as_none(content: str, problem: Problem, tmp_path: Path) -> None:
    assert errors_on_disk(tmp_path, 0, problem) is None
    file = file_of(tmp_path, 0)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content.replace("%d", str(VERSION)))
    assert errors_on_disk(tmp_path, 0, problem) is None
