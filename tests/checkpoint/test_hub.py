"""Finding a checkpoint: a folder, a file, or what the hub has."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tests.errors import raises

from amalgam.checkpoint import resolve
from amalgam.errors import CheckpointError


def test_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("org/name") == tmp_path / "org" / "name"
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize(
    "text", ["/no/such/folder", "./missing", "missing", "a/b/c", "", " ", "..x/y", "a b/c", "a/b\n", "\0"]
)
def test_what_is_neither_folder_nor_hub_id(text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with raises(CheckpointError) as caught:
        resolve(text)
    assert repr(text)[1:-1].removeprefix("./") in caught.value.what


def test_a_path_that_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    too_long = tmp_path / ("x" * 5000)
    with raises(CheckpointError, too_long):
        resolve(str(too_long))

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", refuse)
        with raises(CheckpointError, tmp_path):
            resolve(str(tmp_path))


def test_file_instead_of_folder(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").touch()
    with raises(CheckpointError, tmp_path / "x.safetensors"):
        resolve(str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("has_safetensors", [False, True])
def test_hub_pickles_only_without_safetensors(
    has_safetensors: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (hub_id, ignore_patterns) == ("org/name", ["*/*"])
        asked.extend(allow_patterns)
        (tmp_path / ("model.safetensors" if has_safetensors else "pytorch_model.bin")).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name") == tmp_path
    assert {"*.safetensors", "*.json"} <= set(asked)
    assert ("*.bin" in asked) is not has_safetensors


def test_a_gguf_file_of_a_hub_repository_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(hub_id: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert hub_id == "org/name"
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for name, wanted in (("m-Q4_0.gguf", "m-Q4_0.gguf"), ("m-00001-of-00002.gguf", "m-*-of-00002.gguf")):
        (tmp_path / name).touch()
        assert resolve(f"org/name:{name}") == tmp_path / name
        assert asked[-1] == [wanted]
    with raises(CheckpointError, "absent.gguf"):
        resolve("org/name:absent.gguf")
    with raises(CheckpointError, "org/name:NAME.gguf"):
        resolve("org/name")


def test_hub_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    why = "Name or service not known"
    with raises(CheckpointError, "'org/name'", tmp_path / "org/name", why, "HF_ENDPOINT", "HF_HUB_OFFLINE=1"):
        resolve("org/name")


def test_a_hub_that_is_not_to_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is told to set what is set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with raises(CheckpointError, tmp_path / "org/name", "HF_HUB_OFFLINE") as caught:
        resolve("org/name")
    assert "HF_HUB_OFFLINE=1" not in caught.value.remedy and "HF_ENDPOINT" not in caught.value.remedy


def test_a_gguf_file_of_a_folder_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "org" / "name").mkdir(parents=True)
    missing = str(tmp_path / "org" / "name" / "m.gguf")
    with raises(CheckpointError) as caught:
        resolve("org/name:m.gguf")
    assert caught.value.what == f"There is no file {missing!r}."
    (tmp_path / "org" / "name" / "other.gguf").touch()
    with raises(CheckpointError, "other.gguf"):
        resolve("org/name:m.gguf")
    (tmp_path / "org" / "name" / "m.gguf").touch()
    assert str(resolve("org/name:m.gguf")) == missing


@pytest.mark.parametrize("text", ["", " "])
def test_no_name_is_no_folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with raises(CheckpointError) as caught:
        resolve(text)
    assert repr(text) in caught.value.what and str(tmp_path) not in caught.value.what
