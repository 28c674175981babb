"""JSON that somebody else wrote: all of RFC 8259, and nothing that two readers would read differently.

In: bytes, or a file with a limit on its size. Out: Python values. Refused are keys that stand twice in one object, NaN,
infinite numbers, lone surrogates and bytes that are not UTF-8; what is nested too deeply, and integers of thousands of
digits, are refused because they are slow. Advice is read as the standard library reads it. Must never know what the
values mean.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from amalgam.errors import CheckpointError, describe

MAX_FILE_BYTES = 16 * 2**20
_REMEDY = "Correct it or download it again."
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # spelled in ASCII; UTF-8 has none
# All up to half of a pair. What has matched is never given back, so that it takes linear time and no memory.
_WHOLE = re.compile(
    rb"(?:[^\\]++|\\(?:[^u]|u(?![dD][89a-fA-F])|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F]))*+", re.DOTALL
)


def parse_json(raw: bytes, *, max_keys: int | None = None, max_values: int | None = None) -> Any:
    """
    Args:
        max_keys: the most keys and objects that it may have, and the most lists; None: only its length counts.
        max_values: the most values in lists and objects, about.

    Raises:
        ValueError: it is no such JSON; says what is wrong.
    """
    for mark, most, what in ((b"[", max_keys, "lists"), (b",", max_values, "values")):
        if most is not None and raw.count(mark) > most and _more_marks_than(most, mark).match(raw):
            raise ValueError(f"it has more than {most} {what}")
    num_keys = 0

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = sorted(name for name, _ in pairs)
            repeated = next(name for name, following in pairwise(names) if name == following)
            raise ValueError(f"the key {describe(repeated)} stands twice")
        return result

    def counted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal num_keys
        num_keys += len(pairs) + 1
        if max_keys is not None and num_keys > max_keys:
            raise ValueError(f"it has more than {max_keys} keys")
        return unique(pairs)

    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=unique if max_keys is None else counted,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _SURROGATE.search(raw):
        whole = _WHOLE.match(raw)
        assert whole is not None  # it matches nothing, too
        if half := raw[whole.end() :][:6].decode():
            raise ValueError(f"a string has {half}, half of a surrogate pair")
    return value


@cache
def _more_marks_than(count: int, mark: bytes) -> re.Pattern[bytes]:
    """What JSON begins with that has more of a bracket or comma, those in strings left out.

    The parser tells of no list, and of no number: it calls nobody for them, and lets no other thread run meanwhile.
    """
    other = rb'(?:[^"%b]++|"(?:[^"\\]++|\\.)*+")*+' % re.escape(mark)
    return re.compile(rb"(?:%b%b){%d}+" % (other, re.escape(mark), count + 1), re.DOTALL)


def is_longer(value: Any, max_chars: int) -> bool:
    """Whether the JSON of a value has more characters, written without spaces. Takes time in `max_chars`, not in the
    value. May miss some: it does not count escapes, and little of a number.
    """
    num_chars, rest = 0, [value]
    while rest and num_chars <= max_chars:
        item = rest.pop()
        if isinstance(item, str):
            num_chars += len(item) + 2
        elif isinstance(item, list):
            num_chars += 1 + max(1, len(item))  # the brackets and commas
            if num_chars <= max_chars:
                rest += item
        elif isinstance(item, dict):
            num_chars += 1 + max(1, 2 * len(item))  # the braces, colons and commas
            if num_chars <= max_chars:
                rest += item  # the keys
                rest += item.values()
        else:
            num_chars += max(1, item.bit_length() // 4) if isinstance(item, int) else 1
    return num_chars > max_chars


def parse_foreign_json(raw: bytes, where: str, parse: Callable[[bytes], Any] = parse_json) -> Any:
    """`parse_json` for what belongs to a checkpoint.

    Raises:
        CheckpointError: it is no such JSON; `where` says whose it is.
    """
    try:
        return parse(raw)
    except ValueError as error:
        raise CheckpointError(f"{where} holds invalid JSON: {error}.", remedy=_REMEDY) from None


def read_json_object(file: Path, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object in a file, which may begin with a byte order mark.

    Raises:
        CheckpointError: it cannot be read, is larger than `max_bytes`, or holds something else.
    """
    return _read_object(file, max_bytes, parse_json)


def read_advice(file: Path, max_bytes: int = MAX_FILE_BYTES) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object in a file whose faults must not keep a model from being served.

    NaN and infinite numbers are floats, half a surrogate pair is a question mark, and of a key that stands twice the
    last value holds.

    Returns:
        The object, and what has not held of it.

    Raises:
        CheckpointError: it cannot be read, is larger than `max_bytes`, or is no JSON object for any reader.
    """
    replaced: dict[str, Any] = {}

    def last(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal replaced
        pairs = [(name.encode(errors="replace").decode(), value) for name, value in pairs]
        result = dict(pairs)
        replaced = {name: value for name, value in pairs if value is not result[name]}  # in the end, the whole file's
        return result

    def parse(raw: bytes) -> Any:
        try:
            return json.loads(raw.decode(), object_pairs_hook=last)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    return _read_object(file, max_bytes, parse), replaced


def _read_object(file: Path, max_bytes: int, parse: Callable[[bytes], Any]) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
            size = stream.seek(0, 2)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}).", remedy="Check its permissions.") from error
    if len(raw) > max_bytes:
        raise CheckpointError(
            f"{file} has {size} bytes; at most {max_bytes} are allowed.",
            remedy="Download the file again, or check that it is what its name says.",
        )
    value = parse_foreign_json(raw.removeprefix(codecs.BOM_UTF8), str(file), parse)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds {describe(value)} instead of a JSON object.", remedy=_REMEDY)
    return value


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {describe(text)} is out of range")
    return value
