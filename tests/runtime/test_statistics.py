"""The statistics as they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amalgam.errors import RequestError
from amalgam.runtime import statistics
from amalgam.runtime.statistics import ExpertStatistics
from tests.errors import raises
from tests.experts.routing import busy_tracker


def test_a_set_is_not_merged_under_a_name_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker: Any = busy_tracker(0)
    served = ExpertStatistics(tracker, lambda: pytest.fail("no weights are asked for"), "a")
    assert served.save_set(tmp_path, "a").file_name == "a.safetensors"
    monkeypatch.setattr(statistics, "load_named", lambda *_: pytest.fail("no set is read"))
    with raises(RequestError, "name", "'../x'"):
        served.save_set(tmp_path, "../x", ["a"])
