"""What formats of tool calls have in common: a call as a JSON object, and arguments as text of declared types.

In: a reader that stands before a call. Out: the call's parts, as they come. Must never know: what stands around calls.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from amalgam.errors import RequestError, describe
from amalgam.text.answers.contract import Answer, GrammarWriter, Tools, name_of, schema_of
from amalgam.text.answers.reading import Reader, Waiting

_ARGUMENTS = ("arguments", "parameters")
_MAX_NAME_CHARS = 256
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class Found(enum.Enum):
    NO_CALL = enum.auto()  # and nothing has been said of one
    CALL = enum.auto()
    BROKEN = enum.auto()  # a call whose arguments have begun and are no JSON from here on


def read_call(reader: Reader, answer: Answer, only: Collection[str] | None = None) -> Waiting[Found]:
    """Read `{"name": …, "arguments": {…}}`, whatever the order of the keys and whatever else there is.

    Args:
        only: the names of functions without which, or without arguments, it is something else than a call.
    """
    name: str | None = None
    held: str | None = None  # arguments before the name
    begun = False
    if not (yield from reader.accept("{")):
        return Found.NO_CALL
    broken = Found.NO_CALL
    while True:
        yield from reader.spaces()
        if (yield from reader.accept("}")):
            break
        key = yield from _value(reader)
        yield from reader.spaces()
        if not isinstance(key, str) or not (yield from reader.accept(":")):
            return broken
        yield from reader.spaces()
        if key in _ARGUMENTS and not begun and held is None and name is not None and reader.text.startswith("{"):
            answer.call(name)
            begun, broken = True, Found.CALL  # its arguments stay whole, whatever follows them
            if not (yield from reader.json_value(answer.arguments)):
                return Found.BROKEN
        else:
            value = yield from _value(reader)
            if value is _BROKEN:
                return broken
            if key == "name" and not begun:
                if not isinstance(value, str) or not _is_text(value) or (only is not None and value not in only):
                    return broken
                name = value
            elif key in _ARGUMENTS and not begun:
                held = _as_arguments(value)
                if held is None:
                    return broken
            if name is not None and held is not None and not begun:
                answer.call(name)
                answer.arguments(held)
                begun, broken = True, Found.CALL
        yield from reader.spaces()
        yield from reader.accept(",")
    if name is None or (only is not None and not begun):
        return Found.NO_CALL
    if not begun:
        answer.call(name)
        answer.arguments("{}")
    return Found.CALL


def read_calls(reader: Reader, answer: Answer) -> Waiting[Found]:
    """Read a list of `read_call`'s objects behind its `[`; the reader remembers, and forgets what was a call."""
    num_calls = 0
    while True:
        yield from reader.spaces()
        if num_calls and (yield from reader.accept("]")):
            return Found.CALL
        if num_calls:
            reader.forget()
            reader.remember()
        found = yield from read_call(reader, answer)
        if found is Found.BROKEN or (found is Found.NO_CALL and not num_calls):
            return found
        if found is Found.NO_CALL:
            answer.content(reader.forget())
            return Found.CALL
        num_calls += 1
        yield from reader.spaces()
        yield from reader.accept(",")


_BROKEN = object()


def _value(reader: Reader) -> Waiting[Any]:
    """A JSON value, as an object; `_BROKEN` if it is none."""
    parts: list[str] = []
    is_whole = yield from reader.json_value(parts.append)
    try:
        return json.loads("".join(parts)) if is_whole else _BROKEN
    except (ValueError, RecursionError):
        return _BROKEN


def _as_arguments(value: Any) -> str | None:
    """Arguments as JSON; some models write them as a string that holds it. None: they are none."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if value is None:
        value = {}
    try:
        return written(value) if isinstance(value, dict) else None
    except ValueError:
        return None


def held_until(reader: Reader, marks: Sequence[str]) -> Waiting[tuple[str, str | None]]:
    """The text before the first of the marks, and the mark; None: it never comes."""
    parts: list[str] = []
    mark = yield from reader.until(marks, parts.append)
    return "".join(parts), mark


def is_name(text: str) -> bool:
    """Whether a text can be a function's name."""
    return 0 < len(text) <= _MAX_NAME_CHARS and not any(char.isspace() or char in '{}"<>' for char in text)


class TypedArguments:
    """Arguments that come one by one as text; their JSON goes to the answer."""

    def __init__(self, answer: Answer, name: str) -> None:
        self._answer = answer
        tool = next((tool for tool in answer.tools if name_of(tool) == name), None)
        self._schema = {} if tool is None else schema_of(tool)
        self._names: set[str] = set()
        answer.call(name)

    def add(self, key: str, text: str, *, is_whole: bool = True) -> None:
        """One more; one that breaks off stays open."""
        value = self._typed(key, text) if is_whole else written(text)[:-1]
        separator = ", " if self._names else "{"
        self._names.add(key)
        self._answer.arguments(f"{separator}{written(key)}: {value}")

    def finish(self) -> None:
        self._answer.arguments("}" if self._names else "{}")

    def _typed(self, key: str, text: str) -> str:
        properties = self._schema.get("properties")
        types = types_of(properties.get(key)) if isinstance(properties, Mapping) else set()
        if not types or ("string" in types and not (text == "null" and "null" in types)):
            return written(text)
        try:
            return written(json.loads(text))
        except (ValueError, RecursionError):
            return written(text)


def written(value: Any) -> str:
    """As JSON that UTF-8 can hold.

    Raises:
        ValueError: JSON has neither NaN nor infinity, nor numbers of that many digits.
        TypeError: a value of a type that JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if _is_text(text) else json.dumps(value, allow_nan=False)


def _is_text(text: str) -> bool:
    """Whether it is some, and UTF-8 can hold it: escapes may write half a character."""
    return bool(text) and _HALF_CHARACTER.search(text) is None


def types_of(schema: Any) -> set[str]:
    """The JSON types that a schema names; empty if it names none, or is none."""
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    types = {item for item in (declared, *_listed(declared)) if isinstance(item, str)}
    for key in ("anyOf", "oneOf"):
        for item in _listed(schema.get(key)):
            types |= types_of(item)
    if not types and _are_texts(schema.get("enum")):
        types = {"string"}
    return types


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _are_texts(value: Any) -> bool:
    return bool(_listed(value)) and all(isinstance(item, str) for item in value)


def grammar_of_calls(
    writer: GrammarWriter, tools: Tools, parallel: bool, before: str, after: str, between: str = "\n"
) -> str:
    """Rules for calls whose arguments are JSON.

    Args:
        before, after: what stands around the arguments; `{name}` is the function's name, as JSON without quotes.
    """
    lines = [f"calls: call{f' ({writer.text(between)} call)*' if parallel else ''}"]
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        name = json.dumps(name_of(tool), ensure_ascii=False)[1:-1]
        lines.append(
            f"call_{index}: {writer.text(before.replace('{name}', name))} arguments_{index} {writer.text(after)}"
        )
        lines.append(f"arguments_{index}: {writer.json(schema_of(tool))}")
    return "\n".join(lines) + "\n"


def grammar_of_typed_calls(
    writer: GrammarWriter, tools: Tools, parallel: bool, before: str, argument: tuple[str, str], after: str
) -> str:
    """Rules for calls whose arguments come one by one as text, the required ones always.

    Args:
        before, after: what stands around the arguments; `{name}` is the function's name.
        argument: what stands around the value of one; `{key}` is its name.

    Raises:
        RequestError: a tool's parameters are no schema of an object.
    """
    lines = [f"calls: call{f' ({writer.text(chr(10))} call)*' if parallel else ''}"]
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        schema = schema_of(tool)
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise RequestError(
                f"The parameters of {name_of(tool)} are {describe(schema)}.",
                remedy="Give a JSON schema, whose properties are an object and required a list.",
                param="tools",
            )
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        rules = []
        for place, (key, value) in enumerate(properties.items()):
            rule = f"argument_{index}_{place}"
            rules.append(rule if key in required else f"{rule}?")
            lines += _argument(writer, rule, {**definitions, **value} if isinstance(value, dict) else {}, key, argument)
        around = [writer.text(before.replace("{name}", name_of(tool))), *rules, writer.text(after)]
        lines.append(f"call_{index}: {' '.join(around)}")
    return "\n".join(lines) + "\n"


def _argument(
    writer: GrammarWriter, rule: str, schema: Mapping[str, Any], key: str, around: tuple[str, str]
) -> list[str]:
    start, end = writer.text(around[0].replace("{key}", key)), around[1]
    types = types_of(schema)
    if types and "string" not in types:
        return [f"{rule}: {start} {rule}_value {writer.text(end)}", f"{rule}_value: {writer.json(schema)}"]
    choices = schema.get("enum")
    if choices and _are_texts(choices):
        return [f"{rule}: {start} ({' | '.join(map(writer.text, choices))}) {writer.text(end)}"]
    return [f"{rule}: {start} {rule}_text", writer.up_to(f"{rule}_text", end)]
