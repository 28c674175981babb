"""Typed reading of an object that somebody else wrote: a config.json, a quantization, metadata, a description.

In: a mapping, and where it stands. Out: values of the type that was asked for. Every complaint names the file, the key
with the keys of the objects around it, its value, and what is allowed. Must never know what a key means.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, ClassVar, Final, NoReturn, Self, TypeVar

from amalgam.errors import CheckpointError, UnsupportedError, describe

D = TypeVar("D")
T = TypeVar("T")


class Required(Enum):
    """What stands for the default of a key that must be there."""

    REQUIRED = "required"


REQUIRED: Final = Required.REQUIRED
MAX_INTEGER: Final = 2**31 - 1


class Fields:
    """Typed access to a mapping.

    Keys may have synonyms, which must agree where several are there; null counts as absent. Without a default a key is
    required; what the default `None` stands for, the caller knows. Remembers which keys were asked for, here and in the
    objects inside (`unread`).

    Attributes:
        least: the smallest integer where nothing else is said.
        null_is_false: where true or false is asked for.
        cure: what else helps against any complaint; a sentence.
    """

    least: ClassVar[builtins.int] = 0
    null_is_false: ClassVar[builtins.bool] = False
    cure: ClassVar[str] = ""

    def __init__(self, values: Mapping[str, Any], where: str, path: str = "") -> None:
        """
        Args:
            where: the file, for messages.
            path: what stands before each key in messages: `quantization_config.`
        """
        self.values = values
        self.where = where
        self.path = path
        self._read: set[str] = set()
        self._inner: builtins.list[Self] = []

    def get(self, *keys: str, default: Any = None) -> Any:
        """The value of the first key that is present and not null."""
        self._read.update(keys)
        present = [key for key in keys if self.values.get(key) is not None]
        if not present:
            return default
        value = self.values[present[0]]
        for key in present[1:]:
            if _folded(self.values[key]) != _folded(value):
                self.refuse(key, self.values[key], f"what {present[0]} says, {describe(value)}")
        return value

    def present(self, *keys: str) -> str:
        """The synonym that counts, for messages; the first if none is there."""
        return next((key for key in keys if self.values.get(key) is not None), keys[0])

    def is_null(self, key: str) -> builtins.bool:
        """Whether a key is there and null, where that means something else than its absence."""
        return key in self.values and self.values[key] is None

    def int(
        self,
        *keys: str,
        default: D | Required = REQUIRED,
        low: builtins.int | None = None,
        high: builtins.int = MAX_INTEGER,
    ) -> builtins.int | D:
        """An integer from `low` (`least` where that is not said) to `high`."""
        low = self.least if low is None else low
        found: builtins.int | D = self._checked(
            keys,
            default,
            lambda value: type(value) is int and low <= value <= high,
            f"an integer from {low}" + ("" if high == MAX_INTEGER else f" to {high}"),
        )
        return found

    def float(
        self,
        *keys: str,
        default: D | Required = REQUIRED,
        low: builtins.float = -sys.float_info.max,
        high: builtins.float = sys.float_info.max,
    ) -> builtins.float | D:
        """A finite number from `low` to `high`."""
        least = "" if low < 0 else f" of at least {low:g}"
        most = "" if high == sys.float_info.max else f" up to {high:g}"
        found: builtins.float | D = self._checked(
            keys,
            default,
            lambda value: _is_number(value) and low <= value <= high,
            f"a finite number{least}{most}",
            float,
        )
        return found

    def bool(self, *keys: str, default: D | Required = REQUIRED) -> builtins.bool | D:
        if self.null_is_false and any(map(self.is_null, keys)) and self.get(*keys) is None:
            return False
        found: builtins.bool | D = self._checked(keys, default, lambda value: isinstance(value, bool), "true or false")
        return found

    def text(self, *keys: str, default: D | Required = REQUIRED) -> str | D:
        found: str | D = self._checked(keys, default, lambda value: isinstance(value, str), "a string")
        return found

    def list(self, *keys: str, of: type[T], what: str, default: D | Required = REQUIRED) -> builtins.list[T] | D:
        """A list of values of one type; floats may be integers.

        Args:
            what: what they are, for messages: `names`.
        """
        kinds = {int, float} if of is float else {of}
        found: builtins.list[T] | D = self._checked(
            keys,
            default,
            lambda value: _is_list(value) and kinds.issuperset(map(type, value)),
            f"a list of {what}",
            list,
        )
        return found

    def object(self, key: str, *, default: D | Required = REQUIRED) -> Self | D:
        """The fields of an object."""
        found: Self | D = self._checked(
            (key,),
            default,
            lambda value: isinstance(value, Mapping),
            "an object",
            lambda value: self._inside(value, f"{key}."),
        )
        return found

    def objects(self, key: str) -> dict[str, Self]:
        """The fields of each object in an object; empty if absent or false."""
        value = self.get(key) or {}
        if not isinstance(value, Mapping):
            self.refuse(key, value, "an object of objects")
        inside = self._inside(value, f"{key}.")
        return {name: inside.object(name) for name in value}

    def expect(self, key: str, *allowed: Any) -> None:
        """Fail unless a key is absent, null, or one of the values that the caller implements."""
        value = self.get(key)
        if value is not None and value not in allowed:
            self.unsupported(key, value, " or ".join(map(repr, allowed)))

    def pass_over(self, keys: Iterable[str]) -> None:
        """Count keys as asked for: what they say does not matter."""
        self._read.update(keys)

    def unread(self) -> Iterator[tuple[Self, str, Any]]:
        """The keys that nobody has asked for, here and in the objects that were read, with their values."""
        for key, value in self.values.items():
            if key not in self._read:
                yield self, key, value
        for inner in self._inner:
            yield from inner.unread()

    def refuse(self, key: str, value: Any, allowed: str) -> NoReturn:
        """Fail because a value cannot be."""
        raise CheckpointError(self._has(key, value), remedy=f"Expected {allowed}. {self.cure}".strip())

    def unsupported(self, key: str, value: Any, allowed: str) -> NoReturn:
        """Fail because of a value that others may understand."""
        raise UnsupportedError(self._has(key, value), remedy=f"Supported: {allowed}. {self.cure}".strip())

    def lacks(self, *keys: str) -> NoReturn:
        """Fail because a key is missing."""
        raise CheckpointError(
            f"{self.where} has no {' or '.join(self.path + key for key in keys)}.",
            remedy=f"Add the key: it is required. {self.cure}".strip(),
        )

    def _has(self, key: str, value: Any) -> str:
        return f"{self.where} has {self.path}{key} = {describe(value)}."

    def _checked(
        self,
        keys: tuple[str, ...],
        default: Any,
        is_right: Callable[[Any], builtins.bool],
        allowed: str,
        convert: Callable[[Any], Any] | None = None,
    ) -> Any:
        value = self.get(*keys)
        if value is None and default is REQUIRED:
            self.lacks(*keys)
        value = default if value is None else value
        if value is None:
            return None
        if not is_right(value):
            self.refuse(self.present(*keys), value, allowed)
        return value if convert is None else convert(value)

    def _inside(self, values: Mapping[str, Any], path: str) -> Self:
        inner = type(self)(values, self.where, self.path + path)
        self._inner.append(inner)
        return inner


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value
