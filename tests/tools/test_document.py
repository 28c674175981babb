"""The generated docs are those that the code describes."""

from __future__ import annotations

from pathlib import Path

import pytest

from amalgam.errors import CheckpointError
from amalgam.tools.document import CHECKOUT, FILES, write_files
from tests.conftest import ROOT
from tests.errors import raises


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_committed_file_is_current(path: Path) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == FILES[path](), "run `python -m amalgam.tools.document`"


def test_files_are_written_in_the_checkout_whatever_folder_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CHECKOUT == ROOT
    monkeypatch.chdir("/")
    with raises(CheckpointError, tmp_path / next(iter(FILES))):
        write_files(tmp_path)
    (tmp_path / "docs").mkdir()
    write_files(tmp_path)
    for path in FILES:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes()
