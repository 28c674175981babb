"""A configuration file that changes while the model runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from amalgam.config.reading import load_settings
from amalgam.errors import ConflictError, PlanError, UnavailableError
from amalgam.runtime.changes import ChangeRequest
from amalgam.runtime.config_watch import ConfigWatch, differing

TEXT = """
model:
  base_path: /models/demo
  mixed_precision:
    fp8_path: /models/demo-fp8
    weight_mapping: {mapping}
server:
  port: {port}
"""


class Watched:
    """A file, and what its watch has asked for."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.yaml"
        self.write("{}")
        self.asked: list[dict[str, str]] = []
        self.refusal: Exception | None = None
        self.watch = ConfigWatch(self.path, self.read, self.read(), self.change)

    def write(self, mapping: str, port: int = 8080) -> None:
        """As editors do: beside it, then renamed; each time at another time."""
        number = getattr(self, "num_writes", 0) + 1
        self.num_writes = number
        new = self.path.with_suffix(".new")
        new.write_text(TEXT.replace("{mapping}", mapping).replace("{port}", str(port)))
        os.utime(new, ns=(number, number))
        new.replace(self.path)

    def read(self) -> Any:
        return load_settings(self.path, environ={})

    def change(self, request: ChangeRequest) -> None:
        if self.refusal is not None:
            raise self.refusal
        assert request.rules is not None
        self.asked.append({rule.pattern: rule.source for rule in request.rules})

    def look_twice(self) -> None:
        self.watch.look()
        self.watch.look()


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_a_new_mapping_is_taken_once_it_is_settled(watched: Watched) -> None:
    watched.look_twice()
    assert watched.asked == []
    watched.write("{'model.*': fp8}")
    watched.watch.look()  # somebody may be writing still
    assert watched.asked == []
    watched.look_twice()
    watched.look_twice()
    assert watched.asked == [{"model.*": "fp8"}]
    watched.write("{'model.*': fp8}", port=9090)  # not in its mapping
    watched.look_twice()
    assert len(watched.asked) == 1
    watched.write("{}")
    watched.look_twice()
    assert watched.asked[1:] == [{}]


def test_a_file_that_is_away_or_wrong_changes_nothing(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    text = watched.path.read_text()
    watched.path.unlink()
    watched.look_twice()
    for wrong in ("model: [", text.replace("{}", "{a: nobody}")):
        watched.path.write_text(wrong)
        with caplog.at_level(logging.WARNING):
            watched.look_twice()
            watched.look_twice()
        assert len([record for record in caplog.records if str(watched.path) in record.getMessage()]) == 1
        caplog.clear()
    assert watched.asked == []
    watched.write("{'model.*': fp8}")
    watched.look_twice()
    assert watched.asked == [{"model.*": "fp8"}]


def test_what_is_refused_is_tried_again_only_while_another_change_is_under_way(watched: Watched) -> None:
    watched.write("{'model.*': fp8}")
    watched.refusal = ConflictError("Another change is under way.")
    watched.look_twice()
    watched.refusal = None
    watched.watch.look()
    assert watched.asked == [{"model.*": "fp8"}]
    watched.write("{'model.layers.99.*': fp8}")
    watched.refusal = PlanError("It matches nothing.")
    watched.look_twice()
    watched.refusal = None
    watched.look_twice()
    assert len(watched.asked) == 1
    watched.write("{'model.*': base}")
    watched.refusal = UnavailableError("The model has been closed.")
    with pytest.raises(UnavailableError):
        watched.look_twice()


def test_other_settings_are_told_to_need_a_restart(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.write("{}", port=9090)
    with caplog.at_level(logging.WARNING):
        watched.look_twice()
    assert "server.port" in caplog.text
    assert differing({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}, "d": 2}) == {"a.c", "d"}
