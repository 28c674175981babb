"""JSON from somebody else: everything that is allowed is read as it is, everything else is refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from amalgam.base.strict_json import parse_foreign_json, parse_json, read_json_object
from amalgam.errors import CheckpointError


@pytest.mark.parametrize(
    "value",
    [{}, [], "ä\n", 0, -1.5, None, True, 2**64, -(10**30), {"a": [{"b": {"": ["\0", "𝄞"]}}]}, [[1e-300, "\\ud800"]]],
)
@pytest.mark.parametrize("is_ascii", [True, False])
def test_what_is_json_is_read(value: Any, is_ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "Expecting value"),
        (b"{", "line 1 column 2"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "line 1 column 2"),
        (b'{"a": 1,}', "line 1 column 9"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' stands twice"),
        (b'[[{"x": {"deep": 1, "deep": 1}}]]', "'deep' stands twice"),
        (b'{"a": 1, "\\u0061": 2}', "'a' stands twice"),
        (b"[NaN]", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "'1e999'"),
        (b"[" + b"9" * 5000 + b"]", "4300 digits"),
        (b'"\xff"', "utf-8"),
        (b'"a\nb"', "line 1 column 3"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    ],
)
def test_what_two_readers_would_read_differently_is_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        parse_json(raw)
    assert len(str(caught.value)) < 300


def test_keys_are_counted_with_their_objects() -> None:
    raw = json.dumps([{"a": 1, "b": 2}, {}]).encode()
    assert parse_json(raw, max_keys=4) == [{"a": 1, "b": 2}, {}]
    with pytest.raises(ValueError, match="more than 3 keys"):
        parse_json(raw, max_keys=3)


def test_a_complaint_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": NaN}')
    with pytest.raises(CheckpointError, match="NaN") as caught:
        read_json_object(file)
    assert str(file) in caught.value.what
    with pytest.raises(CheckpointError, match="The index of x holds invalid JSON"):
        parse_foreign_json(b"{", "The index of x")


@pytest.mark.parametrize(("text", "value"), [("[1, 2]", "[1, 2] instead"), ('"text"', "'text' instead")])
def test_a_file_holds_an_object(text: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(CheckpointError) as caught:
        read_json_object(file)
    assert value in caught.value.what and str(file) in caught.value.what


def test_a_file_has_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"a": 1}')
    assert read_json_object(file, 8) == {"a": 1}
    with pytest.raises(CheckpointError, match="has 8 bytes; at most 7"):
        read_json_object(file, 7)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json_object(tmp_path / "absent.json")
