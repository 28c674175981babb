"""Texts become windows, and what is no text is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amalgam.errors import ConfigError
from amalgam.evaluation.texts import read_texts, sample_of
from amalgam.text.tokenizer import Tokenizer
from tests.conftest import DEMO
from tests.errors import raises


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def test_every_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(["one", {"text": "two"}, " "]))
    (tmp_path / "b.jsonl").write_text('{"text": "three", "id": 1}\n\n"four"\n')
    (tmp_path / "c.txt").write_text("five\n\nsix")
    documents = read_texts([str(tmp_path / "a.json"), f"tales={tmp_path / 'b.jsonl'}", str(tmp_path / "c.txt")])
    assert [(item.domain, item.text) for item in documents] == [
        ("a", "one"),
        ("a", "two"),
        ("tales", "three"),
        ("tales", "four"),
        ("c", "five\n\nsix"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b'{"text": "x"}'),
        ("a.json", b"[3]"),
        ("a.jsonl", b'{"prompt": "x"}'),
        ("a.txt", b"\xff\xfe\x00"),
        ("a.txt", b"  \n"),
        ("a.json", b"["),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with raises(ConfigError, tmp_path / name):
        read_texts([str(tmp_path / name)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with raises(ConfigError, tmp_path / "none.txt"):
        read_texts([str(tmp_path / "none.txt")])


def test_windows_hold_all_tokens_of_all_documents(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"The {number} ships sailed to the harbour and back again." for number in range(25)]
    (tmp_path / "ships.json").write_text(json.dumps(texts))
    sample = sample_of(read_texts([str(tmp_path / "ships.json")]), tokenizer, window=8)
    assert sample.unit == "documents" and sample.num_units == 25
    assert max(len(window.token_ids) for window in sample.windows) == 8
    first = [token for window in sample.windows if window.unit == 0 for token in window.token_ids]
    whole = tokenizer.encode(texts[0])
    assert first == whole[: len(first)] and len(whole) - len(first) <= 1  # one token predicts nothing


def test_one_long_text_is_resampled_by_windows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("The sea was calm. " * 200)
    sample = sample_of(read_texts([str(tmp_path / "long.txt")]), tokenizer, window=32)
    assert sample.unit == "windows" and sample.num_units == len(sample.windows) > 10


def test_a_limit_takes_as_much_of_each_domain(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        texts = [f"{name} {number} went out to see the old house on the hill." for number in range(60)]
        (tmp_path / f"{name}.json").write_text(json.dumps(texts))
    documents = read_texts([str(tmp_path / "one.json"), str(tmp_path / "two.json")])
    sample = sample_of(documents, tokenizer, max_tokens=400)
    tokens = {d: sum(len(w.token_ids) for w in sample.windows if w.domain == d) for d in sample.domains}
    assert set(tokens) == {"one", "two"} and all(180 <= count <= 200 for count in tokens.values())
    assert sample.digest == sample_of(documents, tokenizer, max_tokens=400).digest
    assert sample.digest != sample_of(documents, tokenizer, max_tokens=400, seed=1).digest


def test_the_parts_of_a_split_share_no_document(tokenizer: Tokenizer, tmp_path: Path) -> None:
    texts = [f"Number {number} of the tales tells of a fox." * 3 for number in range(40)]
    (tmp_path / "tales.json").write_text(json.dumps(texts))
    sample = sample_of(read_texts([str(tmp_path / "tales.json")]), tokenizer, window=8)
    calibration, held_out = sample.split(0.25)
    assert held_out.num_units == 10 and calibration.num_units == 30
    assert not {w.unit for w in calibration.windows} & {w.unit for w in held_out.windows}
