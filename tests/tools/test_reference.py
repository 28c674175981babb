"""The configuration reference in the docs is the one that the settings describe."""

from __future__ import annotations

from amalgam.tools.reference import PATH, render
from tests.conftest import ROOT


def test_the_committed_reference_is_current() -> None:
    assert (ROOT / PATH).read_text(encoding="utf-8") == render(), "run `python -m amalgam.tools.reference`"
