"""Typed access to a declared quantization, and what its entries name.

In: objects of somebody's JSON. Out: checked values and predicates over module names; every complaint names the key, its
value and the file. What nobody asked for is refused at the end: a key that a tool has added may change what the weights
mean. Must never know: what a method means.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic_core import SchemaError, SchemaValidator, core_schema

from amalgam.base.fields import Fields
from amalgam.errors import UnsupportedError, describe
from amalgam.formats.declared.keys import HARMLESS, TRANSFORMS
from amalgam.formats.declared.values import Matches

_MAX_PATTERN = 1000
_MAX_PATTERNS = 8192
_MAX_REPEATS = 3


class Reader(Fields):
    """Typed access to a declaration and the objects in it."""

    def __init__(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        super().__init__(values, where, path)
        self._patterns = _Patterns()
        self.pass_over(HARMLESS)

    def refuse_unread(self) -> None:
        """
        Raises:
            UnsupportedError: a key here, or in an object that was read, was neither asked for nor passed over, and its
                value is not one that says nothing (null, false, empty).
        """
        for reader, key, value in self.unread():
            if _says_nothing(value):
                continue
            what = f"{self.where} has {reader.path}{key} = {describe(value)}"
            if key in TRANSFORMS:
                raise UnsupportedError(
                    f"{what}: weights that need a transform of their inputs at run time.",
                    remedy="That is not served. Use a checkpoint that was quantized without rotation.",
                )
            raise UnsupportedError(
                f"{what}, which is not known here and may change what the weights mean.",
                remedy="If it does not, remove it from the file; else use a checkpoint that was made without it.",
            )

    def choice(self, *keys: str, allowed: Sequence[int]) -> int | None:
        """One of some integers; None if absent."""
        value = self.int(*keys, default=None)
        if value is not None and value not in allowed:
            self.refuse(keys[0], value, ", ".join(map(str, allowed)))
        return value

    def group_size(self, *keys: str) -> int | None:
        """A number of inputs, or -1 for all."""
        value = self.int(*keys, default=None, low=-1)
        if value == 0:
            self.refuse(keys[0], value, "a positive number, or -1 for whole rows")
        return value

    def pair(self, key: str) -> tuple[int, int] | None:
        """Two positive integers, `[128, 128]` or `128x128`; None if absent."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
            value = [int(part) for part in value.split("x")]
        if not isinstance(value, list) or len(value) != 2 or not all(type(part) is int and part > 0 for part in value):
            self.refuse(key, value, "two positive integers")
        return value[0], value[1]

    def names(self, *keys: str) -> list[str]:
        """Empty if absent."""
        return self.list(*keys, of=str, what="names", default=[])

    def count_patterns(self, key: str, number: int) -> None:
        """Refuse more patterns, in the whole declaration, than can be tried on every weight's name."""
        self._patterns.count += number
        if self._patterns.count > _MAX_PATTERNS:
            self.refuse(key, f"{self._patterns.count} patterns", f"at most {_MAX_PATTERNS}")

    def _inside(self, values: Mapping[str, Any], path: str) -> Self:
        inner = super()._inside(values, path)
        inner._patterns = self._patterns
        return inner


@dataclass
class _Patterns:
    """How many there are in a whole declaration."""

    count: int = 0


def _says_nothing(value: Any) -> bool:
    """Whether a key with this value means what its absence means."""
    return value is None or value is False or value in ("", [], {})


def within(entries: Iterable[str]) -> Matches:
    """Whole parts of a name: `mlp.gate` is in `model.layers.3.mlp.gate`, not in `….mlp.gate_proj`."""
    wanted = {tuple(entry.removesuffix(".weight").split(".")) for entry in entries if entry}
    lengths = {len(entry) for entry in wanted}

    def matches(module: str) -> bool:
        parts = tuple(module.split("."))
        return any(
            parts[start : start + length] in wanted for length in lengths for start in range(len(parts) - length + 1)
        )

    return matches


def regex(reader: Reader, key: str, patterns: Sequence[str], *, anywhere: bool = False) -> Matches:
    """Patterns matched from the start of a name (or anywhere), not bound to its end."""
    reader.count_patterns(key, len(patterns))
    compiled = [_compiled(reader, key, pattern, anywhere=anywhere) for pattern in patterns]
    return lambda module: any(matches(module) for matches in compiled)


def _compiled(reader: Reader, key: str, pattern: str, *, anywhere: bool) -> Matches:
    """Anybody may have written the pattern, so it runs in time linear in the name, with pydantic's Rust engine.

    That engine has no look-around. A pattern which needs it is Python's to match, if it cannot take long.
    """
    if len(pattern) > _MAX_PATTERN:
        reader.refuse(key, pattern, f"patterns of at most {_MAX_PATTERN} characters")
    text = pattern if anywhere else f"^(?:{pattern})"
    try:
        return SchemaValidator(core_schema.str_schema(pattern=text, regex_engine="rust-regex")).isinstance_python
    except SchemaError:
        pass
    try:
        python = re.compile(text)
    except re.error as error:
        reader.refuse(key, pattern, f"a regular expression ({error})")
    if len(re.findall(r"(?<!\\)[*+{]", pattern)) > _MAX_REPEATS or re.search(r"\)[*+{]", pattern):
        reader.refuse(key, pattern, f"patterns with look-around of at most {_MAX_REPEATS} repetitions, none of a group")
    return lambda module: python.search(module) is not None


def wildcards(entries: Iterable[str]) -> Matches:
    """Shell wildcards over the whole name, or over the name of a module that it lies in."""
    pattern = re.compile("|".join(fnmatch.translate(entry).replace(r"\Z", r"(?=\.|\Z)") for entry in entries))
    return lambda module: pattern.match(module) is not None
