"""The generated docs are those that the code describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from amalgam.tools.document import FILES
from tests.conftest import ROOT


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_committed_file_is_current(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == FILES[path](), "run `python -m amalgam.tools.document`"
