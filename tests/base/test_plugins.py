"""What other packages bring along."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from amalgam.base import plugins
from amalgam.errors import UnsupportedError
from tests.errors import raises

GROUP = "amalgam.formats"


def offer(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    entry = EntryPoint("halves", value, GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == GROUP else [])


def test_plugins_of_a_group_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, "math:pi")
    assert plugins.load_plugins(GROUP) == [3.141592653589793]
    assert plugins.load_plugins("amalgam.families") == []


@pytest.mark.parametrize("value", ["amalgam.no_such_module:FORMAT", "math:no_such_name"])
def test_a_plugin_for_another_version_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, value)
    with raises(UnsupportedError, GROUP, "'halves'", value):
        plugins.load_plugins(GROUP)
