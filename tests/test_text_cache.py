"""A tokenizer from the cache is the tokenizer, and needs no transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from amalgam import text
from amalgam.errors import CheckpointError
from amalgam.text import Tokenizer
from tests.conftest import DEMO, ROOT

TEXTS = ("It was the best of times.", "明月几时有？", "one<|im_end|>two<|endoftext|> three", "", "😀 e\u0301")
CHAT = [{"role": "user", "content": "Who wrote it?"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo model's tokenizer, to be changed."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in DEMO.glob("*.json"):
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that transformers has read."""
    folders: list[Path] = []
    read = text._read_folder

    def counted(folder: Path) -> object:
        folders.append(folder)
        return read(folder)

    monkeypatch.setattr(text, "_read_folder", counted)
    return folders


def assert_same(found: Tokenizer, expected: Tokenizer) -> None:
    assert (found.vocab_size, found.eos_token_ids) == (expected.vocab_size, expected.eos_token_ids)
    for sample in TEXTS:
        assert found.encode(sample) == expected.encode(sample)
        assert found.decode(expected.encode(sample)) == expected.decode(expected.encode(sample))
    assert found.has_chat_template == expected.has_chat_template


def test_it_is_the_same_and_read_once(folder: Path, tmp_path: Path, reads: list[Path]) -> None:
    expected = Tokenizer.load(folder)
    assert_same(Tokenizer.load(folder, cache_folder=tmp_path / "cache"), expected)
    reads.clear()
    kept = Tokenizer.load(folder, cache_folder=tmp_path / "cache")
    assert_same(kept, expected)
    assert reads == []
    assert kept.encode_chat(CHAT) == kept.encode_chat(CHAT) == expected.encode_chat(CHAT)
    assert reads == [folder], "a chat template needs the true one, once"


def test_transformers_is_not_imported(folder: Path, tmp_path: Path) -> None:
    Tokenizer.load(folder, cache_folder=tmp_path / "cache")
    code = (
        "import sys; from pathlib import Path; from amalgam.text import Tokenizer;"
        "assert Tokenizer.load(Path(sys.argv[1]), cache_folder=Path(sys.argv[2])).encode('one two');"
        "assert 'transformers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "cache")]
    subprocess.run(command, env={"PYTHONPATH": str(ROOT / "src")}, check=True)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_file_is_read(folder: Path, tmp_path: Path, reads: list[Path], name: str) -> None:
    cache = tmp_path / "cache"
    Tokenizer.load(folder, cache_folder=cache)
    if name.endswith(".jinja"):
        (folder / name).write_text("{{ messages[0].content }}")
    else:
        os.utime(folder / name, ns=(1, 1))
    reads.clear()
    changed = Tokenizer.load(folder, cache_folder=cache)
    assert reads == [folder]
    assert_same(Tokenizer.load(folder, cache_folder=cache), changed)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-20],
        lambda data: b"",
        lambda data: b"[]",
        lambda data: b"[" * 100_000,
        lambda data: json.dumps({**json.loads(data), "backend": "{}"}).encode(),
        lambda data: json.dumps({**json.loads(data), "backend": 3}).encode(),
        lambda data: json.dumps({**json.loads(data), "vocab_size": None}).encode(),
        lambda data: json.dumps({**json.loads(data), "more": 3}).encode(),
    ],
)
def test_a_damaged_file_is_written_again(
    folder: Path, tmp_path: Path, reads: list[Path], damage: Callable[[bytes], bytes]
) -> None:
    expected = Tokenizer.load(folder, cache_folder=tmp_path / "cache")
    [path] = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    reads.clear()
    assert_same(Tokenizer.load(folder, cache_folder=tmp_path / "cache"), expected)
    assert_same(Tokenizer.load(folder, cache_folder=tmp_path / "cache"), expected)
    assert reads == [folder]


def test_a_folder_that_cannot_be_written_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_same(Tokenizer.load(folder, cache_folder=tmp_path / "file" / "cache"), Tokenizer.load(folder))


def test_a_damaged_tokenizer_is_an_error_as_ever(folder: Path, tmp_path: Path) -> None:
    Tokenizer.load(folder, cache_folder=tmp_path / "cache")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(folder, cache_folder=tmp_path / "cache")
