"""Names that come out of a checkpoint lead nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amalgam.base.folders import read_json
from amalgam.errors import CheckpointError
from tests.errors import raises


def test_json_object_is_read(tmp_path: Path) -> None:
    value = {"hidden_size": 8, "rope": {"theta": 1e6}, "names": ["ä", None, True]}
    (tmp_path / "config.json").write_text(json.dumps(value))
    assert read_json(tmp_path, "config.json") == value
    assert read_json(tmp_path, "config.json", limit=(tmp_path / "config.json").stat().st_size) == value


@pytest.mark.parametrize(
    ("content", "value"),
    [
        (b"", "line 1 column 1"),
        (b"{", "line 1 column 2"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "'1e999'"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c'"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"[" * 100_000, "nested"),
        (b"[1, 2]", "[1, 2]"),
        (b'{"a": "' + b"x" * 2000 + b'"}', "2009 bytes"),
    ],
)
def test_json_is_refused_by_value(content: bytes, value: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with raises(CheckpointError, value, file):
        read_json(tmp_path, "config.json", limit=1000 if b"xxx" in content else 10**6)


@pytest.mark.parametrize(
    "name", ["../secret.json", "/etc/passwd", "..", ".", "", "sub/config.json", "a\\b", "a\nb", "a\0"]
)
def test_json_names_outside_are_refused(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "config.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    with raises(CheckpointError, folder, repr(name)):
        read_json(folder, name)


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
