"""JSON from somebody else: everything that is allowed is read as it is, everything else is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amalgam.base.strict_json import is_longer, parse_foreign_json, parse_json, read_advice, read_json_object
from amalgam.errors import CheckpointError
from tests.errors import raises


@pytest.mark.parametrize(
    "value",
    [{}, [], "ä\n", 0, -1.5, None, True, 2**64, -(10**30), {"a": [{"b": {"": ["\0", "𝄞"]}}]}, [[1e-300, "\\ud800"]]],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_what_is_json_is_read(value: Any, is_ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "line 1 column 1"),
        (b"{", "line 1 column 2"),
        (b"{} {}", "line 1 column 4"),
        (b"{'a': 1}", "line 1 column 2"),
        (b'{"a": 1,}', "line 1 column 9"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a'"),
        (b'[[{"x": {"deep": 1, "deep": 1}}]]', "'deep'"),
        (b'{"a": 1, "\\u0061": 2}', "'a'"),
        (b"[NaN]", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "'1e999'"),
        (b"[" + b"9" * 5000 + b"]", 4300),
        (b'"\xff"', "utf-8"),
        (b'"a\nb"', "line 1 column 3"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'["\\ud83d\\ude00\\ud83d"]', r"\ud83d,"),
        (b'["\\ud83d\\ude00\\uDE00"]', r"\uDE00,"),
        (b'["\\ud83d\\ud83d\\ude00"]', r"\ud83d,"),
        (b'["\\\\\\ud83d\\\\ude00"]', r"\ud83d,"),
        (b'["\\\\ud83d\\ude00"]', r"\ude00,"),
        (b'["\\ud83d \\ude00"]', r"\ud83d,"),
        (b'["\\ud83d\\u0041"]', r"\ud83d,"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
    ],
)
def test_what_two_readers_would_read_differently_is_refused(raw: bytes, named: object) -> None:
    with raises(ValueError, named) as caught:
        parse_json(raw)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (rb'"\uD83D\uDE00\ud83d\ude00"', "\U0001f600" * 2),
        (rb'"\\ud83d\n\\\\ude00\u00e9\ud7ff\ue000"', "\\ud83d\n\\\\ude00é\ud7ff\ue000"),
        (rb'"\\\ud83d\ude00\\dc00"', "\\\U0001f600\\dc00"),
    ],
)
def test_surrogate_pairs_are_told_from_escaped_backslashes(raw: bytes, value: str) -> None:
    assert parse_json(raw) == value


def test_an_escaped_pair_does_not_have_all_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes as long as reading it, in the event loop."""
    monkeypatch.setattr(json, "dumps", lambda *_, **__: pytest.fail("all is written again"))
    assert parse_json(rb'["\ud83d\ude00"]') == ["\U0001f600"]


def test_keys_are_counted_with_their_objects() -> None:
    raw = json.dumps([{"a": 1, "b": 2}, {}]).encode()
    assert parse_json(raw, max_keys=4) == [{"a": 1, "b": 2}, {}]
    with raises(ValueError, 3):
        parse_json(raw, max_keys=3)


def test_lists_are_counted_and_brackets_in_strings_are_none() -> None:
    text = r'["[[[[", "\\\"[[[[", {"[[": []}]'
    assert parse_json(text.encode(), max_keys=2) == json.loads(text)
    with raises(ValueError, 2):
        parse_json(b"[[], []]", max_keys=2)
    assert parse_json(b'[",,,", 1]', max_values=1) == [",,,", 1]
    with raises(ValueError, 1):
        parse_json(b"[1, 2, 3]", max_values=1)
    with raises(ValueError):
        parse_json(b'["' + b"[" * 9, max_keys=2)  # a string without an end hides nothing


def test_a_complaint_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": NaN}')
    with raises(CheckpointError, "NaN", file):
        read_json_object(file)
    with raises(CheckpointError, "The index of x"):
        parse_foreign_json(b"{", "The index of x")


@pytest.mark.parametrize(("text", "value"), [("[1, 2]", "[1, 2]"), ('"text"', "'text'")])
def test_a_file_holds_an_object(text: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with raises(CheckpointError, value, file):
        read_json_object(file)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json_object(file) == {"a": 1}


def test_advice_comes_with_what_has_not_held(tmp_path: Path) -> None:
    file = tmp_path / "advice.json"
    file.write_text('{"a": 1, "b": {"c": 2, "c": 3}, "a": Infinity, "d": 4}')
    assert read_advice(file) == ({"a": float("inf"), "b": {"c": 3}, "d": 4}, {"a": 1})
    for damaged in ("[1]", "{", "[" * 100_000):
        file.write_text(damaged)
        with raises(CheckpointError, file):
            read_advice(file)


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert read_json_object(file, 8) == {"a": 1}
    with raises(CheckpointError, file, 8, 7):
        read_json_object(file, 7)
    with raises(CheckpointError, tmp_path / "absent.json"):
        read_json_object(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "value", ["", "abc", 0, 15, -(10**30), True, None, 1.5, [], {}, [[], {}], {"a": [1, "b", {"cd": None}]}]
)
def test_what_is_short_is_never_called_longer(value: Any) -> None:
    assert not is_longer(value, len(json.dumps(value, separators=(",", ":"))))


@pytest.mark.parametrize(
    "value", ["a" * 99, [1] * 99, {"a" * 99: 1}, [["a" * 9]] * 9, 10**200, {str(i): 1 for i in range(50)}]
)
def test_what_is_long_is_called_longer(value: Any) -> None:
    assert is_longer(value, 90) and is_longer([{"a": value}], 90)
