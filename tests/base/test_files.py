"""Files and folders appear complete or not at all, whatever happens in between."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from amalgam.base.files import NewFile, new_file, partial_folder, replace_file, resumable_folder
from amalgam.errors import CheckpointError
from tests.errors import raises


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def nothing(folder: Path) -> bool:
    """What of a folder is worth keeping."""
    return False


@pytest.mark.parametrize("content", ["ä\n", b"\0\xff", "", b"x" * 3_000_000])
def test_a_file_is_written_and_replaced(content: str | bytes, tmp_path: Path) -> None:
    target = tmp_path / "a" / "file"
    assert replace_file(target, "old") == target
    replace_file(target, content)
    assert target.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert names(target.parent) == {"file"}


def test_a_new_file_has_the_mode_that_the_user_wants(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", "")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other")
    (tmp_path / "link").symlink_to("other")
    replace_file(tmp_path / "link", "new")
    assert (tmp_path / "other").read_text() == "other" and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("step", ["os.pwrite", "os.fsync", "pathlib.Path.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_file_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    target = tmp_path / "file"
    replace_file(target, "old")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        replace_file(target, "new")
    assert names(tmp_path) == {"file"} and target.read_text() == "old"


def test_a_process_that_dies_before_the_rename_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    replace_file(target, "old")
    code = (
        "import os, pathlib, sys; from amalgam.base.files import replace_file;"
        "pathlib.Path.replace = lambda *_: os._exit(1); replace_file(pathlib.Path(sys.argv[1]), 'new')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(target)], check=False).returncode == 1
    assert len(names(tmp_path)) == 2 and target.read_text() == "old"
    replace_file(target, "newer")  # which takes away what the dead one has left
    assert names(tmp_path) == {"file"} and target.read_text() == "newer"


def test_what_is_committed_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (steps.append("flush"), fsync(descriptor)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (steps.append("rename"), replace(path, target)))
    replace_file(tmp_path / "file", "new")
    assert steps == ["flush", "rename", "flush"]  # the last is the folder's


@pytest.mark.parametrize("step", ["open", "fsync"])
def test_a_folder_that_cannot_be_flushed_has_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    real, replace_path = getattr(os, step), Path.replace

    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, "not here")

    def replace_and_break(path: Path, target: Path) -> None:
        replace_path(path, target)
        monkeypatch.setattr(os, step, fail)

    monkeypatch.setattr(Path, "replace", replace_and_break)
    replace_file(tmp_path / "file", "new")
    monkeypatch.setattr(os, step, real)
    assert names(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "new"


def test_a_file_that_is_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:3], offset))

    def write(file: NewFile) -> None:
        file.write(b"world", 6)
        file.write(memoryview(b"hello "))

    with new_file(tmp_path / "a", ".x-", ".tmp") as file:
        write(file)
        assert len(names(tmp_path / "a")) == 1
        file.commit(tmp_path / "a" / "file")
    assert (tmp_path / "a" / "file").read_bytes() == b"hello world"
    with new_file(tmp_path / "a", ".x-", ".tmp") as file:
        write(file)
    assert names(tmp_path / "a") == {"file"}


def test_a_folder_appears_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with resumable_folder(target, nothing) as folder:
        assert folder.parent == target.parent
        assert not target.exists()
        (folder / "config.json").write_text("{}")
    assert names(target.parent) == {"model"}
    assert names(target) == {"config.json"}


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_folder_without_anything_of_use_vanishes_on_failure(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> None:
        with resumable_folder(tmp_path / "model", nothing) as folder:
            (folder / "config.json").write_text("{}")
            raise error

    with pytest.raises(error):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_only_an_empty_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    with resumable_folder(target, nothing) as folder:
        (folder / "x").touch()
    for existing in (target, target / "x"):
        with raises(CheckpointError, existing), resumable_folder(existing, nothing):
            pytest.fail("must not be entered")
    with raises(CheckpointError, target / "x" / "y"), resumable_folder(target / "x" / "y", nothing):
        pytest.fail("must not be entered")


def test_folder_that_somebody_else_filled_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with raises(CheckpointError, target), resumable_folder(target, nothing):
        target.mkdir()
        (target / "weights").touch()
    assert names(tmp_path) == {"model"}
    assert names(target) == {"weights"}


def test_a_resumable_folder_keeps_what_is_of_use_and_takes_its_place_when_complete(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def attempt(name: str, *, fails: bool) -> set[str]:
        with resumable_folder(target, lambda folder: (folder / "first").exists()) as folder:
            assert folder == partial_folder(target) and not target.exists()
            found = names(folder)
            (folder / name).touch()
            if fails:
                raise ValueError(name)
        return found

    with raises(ValueError, "useless"):
        attempt("useless", fails=True)
    assert names(tmp_path) == set()
    with raises(ValueError, "first"):
        attempt("first", fails=True)
    assert names(tmp_path) == {".model.partial"}
    assert attempt("second", fails=False) == {"first"}
    assert names(tmp_path) == {"model"} and names(target) == {"first", "second"}
    with raises(CheckpointError, target):
        attempt("third", fails=False)
