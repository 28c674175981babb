"""Finding a checkpoint's folder, and reading its small files without leaving it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tests.errors import raises

from amalgam.checkpoint import read_json, resolve
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
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name")
    for part in ("'org/name'", str(tmp_path / "org/name"), "Name or service", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"):
        assert part in str(caught.value)


def test_json_object_is_read(tmp_path: Path) -> None:
    value = {"hidden_size": 8, "rope": {"theta": 1e6}, "names": ["ä", None, True]}
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert read_json(tmp_path, "config.json") == value
    assert read_json(tmp_path, "config.json", limit=(tmp_path / "config.json").stat().st_size) == value


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"", "Expecting value"),
        (b"{", "line 1 column 2"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "'1e999'"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", "[1, 2] instead of a JSON object"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "has 2009 bytes; at most 1000"),
    ],
)
def test_json_is_refused_by_value(content: bytes, value: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_json(tmp_path, "config.json", limit=1000 if b"xxx" in content else 10**6)
    assert value in caught.value.what
    assert str(file) in caught.value.what


@pytest.mark.parametrize(
    "name", ["../secret.json", "/etc/passwd", "..", ".", "", "sub/config.json", "a\\b", "a\nb", "a\0"]
)
def test_json_names_outside_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "config.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    with raises(CheckpointError, folder) as caught:
        read_json(folder, name)
    assert repr(name) in caught.value.what


def test_json_links_and_missing_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.json").write_text("{}")
    (folder / "real.json").write_text('{"a": 1}')
    (folder / "inside.json").symlink_to("real.json")
    (folder / "outside.json").symlink_to("../secret.json")
    assert read_json(folder, "inside.json") == {"a": 1}
    with raises(CheckpointError, folder / "outside.json", tmp_path / "secret.json"):
        read_json(folder, "outside.json")
    with raises(CheckpointError, folder, "config.json"):
        read_json(folder, "config.json")
