"""Typed access to a declared quantization, and what its entries name.

In: objects of somebody's JSON. Out: checked values and predicates over module names; every complaint names the key, its
value and the file. What nobody asked for is refused at the end: a key that a tool has added may change what the weights
mean. Must never know: what a method means.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from pydantic_core import SchemaError, SchemaValidator, core_schema

from amalgam.errors import CheckpointError, UnsupportedError, describe
from amalgam.formats.declared.keys import HARMLESS, TRANSFORMS
from amalgam.formats.declared.values import Matches

_MAX_PATTERN = 1000
_MAX_PATTERNS = 8192
_MAX_REPEATS = 3


class Reader:
    """Typed access to a declaration; every complaint names the key, its value and the file.

    Remembers which keys were asked for, its own and those of the objects in it, for `refuse_unread`.
    """

    def __init__(self, config: Mapping[str, Any], where: str, outer: Reader | None = None) -> None:
        self.config = config
        self.where = where
        self._outer = outer
        self._num_patterns = 0
        self._read: set[str] = set(HARMLESS)
        self._inner: list[Reader] = []

    def get(self, *keys: str) -> Any:
        """The value of the first key that is there and not null; synonyms must agree."""
        self._read.update(keys)
        present = [key for key in keys if self.config.get(key) is not None]
        for key in present[1:]:
            if _folded(self.config[key]) != _folded(self.config[present[0]]):
                raise CheckpointError(
                    f"{self.where} declares {present[0]} {describe(self.config[present[0]])} and {key} "
                    f"{describe(self.config[key])}.",
                    remedy="Both mean the same: remove the one that does not hold for the weights.",
                )
        return self.config[present[0]] if present else None

    def pass_over(self, keys: Iterable[str]) -> None:
        """Count keys as read: they say nothing about what the weights mean."""
        self._read.update(keys)

    def refuse_unread(self) -> None:
        """
        Raises:
            UnsupportedError: a key here, or in an object that was read, was neither asked for nor passed over, and its
                value is not one that says nothing (null, false, empty).
        """
        for key, value in self.config.items():
            if key in self._read or _says_nothing(value):
                continue
            if key in TRANSFORMS:
                raise UnsupportedError(
                    f"{self.where} declares {key} {describe(value)}: weights that need a transform of their inputs at "
                    "run time.",
                    remedy="That is not served. Use a checkpoint that was quantized without rotation.",
                )
            raise UnsupportedError(
                f"{self.where} declares {key} {describe(value)}, which is not known here and may change what the "
                "weights mean.",
                remedy="If it does not, remove it from the file; else use a checkpoint that was made without it.",
            )
        for inner in self._inner:
            inner.refuse_unread()

    def integer(self, *keys: str, allowed: Iterable[int] | None = None, low: int | None = None) -> int | None:
        value = self.get(*keys)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
            self.refuse(keys[0], value, "an integer" if low is None else f"an integer from {low}")
        if allowed is not None and value not in allowed:
            self.refuse(keys[0], value, ", ".join(map(str, allowed)))
        return int(value)

    def group_size(self, *keys: str) -> int | None:
        """A number of inputs, or -1 for all."""
        value = self.integer(*keys)
        if value is not None and value < 1 and value != -1:
            self.refuse(keys[0], value, "a positive number, or -1 for whole rows")
        return value

    def text(self, *keys: str, default: str | None = None) -> str:
        value = self.get(*keys)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            self.refuse(keys[0], value, "a string")
        return str(value)

    def flag(self, *keys: str) -> bool | None:
        value = self.get(*keys)
        if value is not None and not isinstance(value, bool):
            self.refuse(keys[0], value, "true or false")
        return value if isinstance(value, bool) else None

    def names(self, *keys: str) -> list[str]:
        value = self.get(*keys)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(keys[0], value, "a list of names")
        return list(value)

    def objects(self, key: str) -> dict[str, Reader]:
        """An object of objects; empty if absent."""
        value = self.get(key) or {}
        if not isinstance(value, Mapping):
            self.refuse(key, value, "an object of objects")
        for name, inner in value.items():
            if not isinstance(inner, Mapping):
                self.refuse(f"{key} {name!r}", inner, "an object of objects")
        return {name: self._object(inner, f"{key}: {name}") for name, inner in value.items()}

    def object(self, key: str) -> Reader | None:
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse(key, value, "an object")
        return self._object(value, key)

    def _object(self, value: Mapping[str, Any], path: str) -> Reader:
        inner = Reader(value, f"{self.where} ({path})", self)
        self._inner.append(inner)
        return inner

    def count_patterns(self, key: str, number: int) -> None:
        """Refuse more patterns, in the whole declaration, than can be tried on every weight's name."""
        if self._outer is not None:
            self._outer.count_patterns(key, number)
            return
        self._num_patterns += number
        if self._num_patterns > _MAX_PATTERNS:
            self.refuse(key, f"{self._num_patterns} patterns", f"at most {_MAX_PATTERNS}")

    def refuse(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise CheckpointError(f"{self.where} declares {key} {describe(value)}.", remedy=f"Expected {allowed}.")

    def unsupported(self, key: str, value: Any, allowed: str) -> NoReturn:
        raise UnsupportedError(f"{self.where} declares {key} {describe(value)}.", remedy=f"Supported: {allowed}.")


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


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


def regex(reader: Reader, key: str, patterns: Iterable[str], *, anywhere: bool = False) -> Matches:
    """Patterns matched from the start of a name (or anywhere), not bound to its end."""
    compiled = [_compiled(reader, key, pattern, anywhere=anywhere) for pattern in patterns]
    reader.count_patterns(key, len(compiled))
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
