"""Which tokens are read of which files, and what is wrong with files that are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amalgam.calibration.texts import read_texts, sequences
from amalgam.errors import ConfigError
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.errors import raises

TEXT = "The quick brown fox jumps over the lazy dog, and nobody has ever asked it why. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "models" / "demo")


def write(file: Path, content: str) -> Path:
    file.write_text(content, encoding="utf-8")
    return file


def test_kinds_of_files(tmp_path: Path) -> None:
    texts = ["one", "two\nlines"]
    assert read_texts(write(tmp_path / "a.json", json.dumps([*texts, " "]))) == texts
    assert read_texts(write(tmp_path / "a.jsonl", '"one"\n\n{"text": "two\\nlines", "id": 3}\n')) == texts
    assert read_texts(write(tmp_path / "a.txt", "one\ntwo")) == ["one\ntwo"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", '{"text": "x"}'),
        ("a.json", "[1]"),
        ("a.json", "[] []"),
        ("a.jsonl", '{"body": "x"}'),
        ("a.txt", " \n"),
        ("a.json", "[]"),
    ],
)
def test_what_holds_no_texts_is_refused_by_name(name: str, content: str, tmp_path: Path) -> None:
    with raises(ConfigError, tmp_path / name):
        read_texts(write(tmp_path / name, content))


def test_a_file_that_is_not_there_or_no_text_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"ab\xff")
    for name in ("a.json", "b.bin"):
        with raises(ConfigError, tmp_path / name):
            read_texts(tmp_path / name)


def test_domains_have_the_same_share_and_long_texts_are_cut(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = write(tmp_path / "long.json", json.dumps([TEXT * 300]))
    short = write(tmp_path / "short.json", json.dumps([TEXT] * 300))
    found = sequences([long, short], tokenizer, max_tokens=4096, sequence_tokens=256)
    assert found == sequences([long, short], tokenizer, max_tokens=4096, sequence_tokens=256)
    assert sum(map(len, found)) <= 4096 and max(map(len, found)) == 256
    of_long = sum(len(piece) for piece in found if len(piece) == 256)
    assert abs(of_long - 2048) <= 256


def test_too_little_text_says_how_much_there_is(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", TEXT)
    count = len(tokenizer.encode(TEXT))
    with raises(ConfigError, file, count, 1024):
        sequences([file], tokenizer, max_tokens=4096, sequence_tokens=256)
