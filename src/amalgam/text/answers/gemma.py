"""The format of tool calls of Gemma 4.

In: `<|tool_call>call:name{key:value,…}<tool_call|>`, one behind the other. Values are JSON's, but for strings, which
stand between `<|"|>` with nothing escaped, and for the keys of objects, which stand bare. Out: calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from amalgam.errors import RequestError, describe
from amalgam.text.answers.calls import held_until, is_name, types_of, written
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools, name_of, schema_of
from amalgam.text.answers.reading import Emit, Reader, Waiting

_START, _END, _QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
_CALL = "call:"
_MAX_DEPTH = 64
_WORDS = {"None": "null", "True": "true", "False": "false"}  # as templates written in Python show them to the model


class _BrokenError(Exception):
    """What follows is no value."""


def _read(reader: Reader, answer: Answer) -> Reading:
    while (yield from reader.until([_START], answer.content)):
        reader.remember()
        name, mark = "", None
        yield from reader.spaces()
        if (yield from reader.accept(_CALL)):
            name, mark = yield from held_until(reader, ["{", _END])
        read = reader.forget()
        if mark != "{" or not is_name(name.strip()):
            answer.content(_START + read)
            continue
        answer.call(name.strip())
        try:
            yield from _read_members(reader, answer.arguments, 0)
        except _BrokenError:
            yield from reader.until([_END], answer.arguments)
        else:
            yield from reader.spaces()
            yield from reader.accept(_END)
        answer.end_part()


def _read_members(reader: Reader, emit: Emit, depth: int) -> Reading:
    """An object behind its brace, as JSON."""
    emit("{")
    separator = ""
    while not (yield from _read_end(reader, "}")):
        key = yield from _read_key(reader)
        emit(f"{separator}{written(key)}: ")
        yield from _read_value(reader, emit, depth + 1)
        separator = ", "
    emit("}")


def _read_end(reader: Reader, end: str) -> Waiting[bool]:
    """Whether a list of things ends here; passes over the comma in front of the next one."""
    yield from reader.spaces()
    yield from reader.accept(",")
    yield from reader.spaces()
    if (yield from reader.accept(end)):
        return True
    if not reader.text:
        raise _BrokenError
    return False


def _read_key(reader: Reader) -> Waiting[str]:
    if (yield from reader.accept(_QUOTE)):
        key, _ = yield from held_until(reader, [_QUOTE])
        yield from reader.spaces()
        if not (yield from reader.accept(":")):
            raise _BrokenError
        return key
    key, mark = yield from held_until(reader, [":", "{", "}", _END])
    if mark != ":":
        reader.put_back(key + (mark or ""))
        raise _BrokenError
    return key.strip().strip('"')


def _read_value(reader: Reader, emit: Emit, depth: int) -> Reading:
    if depth > _MAX_DEPTH:
        raise _BrokenError
    yield from reader.spaces()
    found = yield from reader.accept(_QUOTE, "{", "[")
    if found == _QUOTE:
        emit('"')
        if (yield from reader.until([_QUOTE], lambda text: emit(written(text)[1:-1] if text else ""))) is None:
            raise _BrokenError
        emit('"')
    elif found == "{":
        yield from _read_members(reader, emit, depth)
    elif found == "[":
        emit("[")
        separator = ""
        while not (yield from _read_end(reader, "]")):
            emit(separator)
            yield from _read_value(reader, emit, depth + 1)
            separator = ", "
        emit("]")
    elif reader.text.startswith('"'):
        if not (yield from reader.json_value(emit)):
            raise _BrokenError
    else:
        yield from _read_bare(reader, emit)


def _read_bare(reader: Reader, emit: Emit) -> Reading:
    """A number, true, false, null; anything else is a string that the model has not quoted."""
    text, mark = yield from held_until(reader, [",", "}", "]", _END])
    if mark is None or not text.strip():
        reader.put_back(text + (mark or ""))
        raise _BrokenError
    reader.put_back(mark)
    word = text.strip()
    try:
        emit(written(json.loads(_WORDS.get(word, word))))
    except (ValueError, RecursionError):
        emit(written(word))


class _Rules:
    """Rules for values that fit schemas, in the way that the format writes them."""

    def __init__(self, writer: GrammarWriter) -> None:
        self._writer = writer
        self._num_rules = 0
        self._any = ""
        self._of_schema: dict[int, str] = {}
        self.lines: list[str] = []

    def new(self, rule: str) -> str:
        """The name of a new rule."""
        self._num_rules += 1
        name = f"value_{self._num_rules}"
        self.lines.append(f"{name}: {rule}")
        return name

    def value(self, schema: Any, root: Mapping[str, Any], depth: int = 0, within: frozenset[int] = frozenset()) -> str:
        """A rule for values of a schema; what is nested deeper than `_MAX_DEPTH` may be anything.

        Args:
            root: what `$ref` starts from. What several refer to has one rule, which may refer to itself.
            within: schemas that this one is an alternative of; one that is its own alternative may be anything.
        """
        schema = _resolved(schema, root)
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH or id(schema) in within:
            return self.anything()
        if (name := self._of_schema.get(id(schema))) is None:
            name = self._of_schema[id(schema)] = f"schema_{len(self._of_schema)}"
            self.lines.append(f"{name}: {self._alternatives(schema, root, depth, within | {id(schema)})}")
        return name

    def _alternatives(
        self, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int, within: frozenset[int]
    ) -> str:
        choices = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(choices, list) and choices:
            return " | ".join(self._exactly(choice) for choice in choices)
        for key in ("anyOf", "oneOf"):
            if isinstance(found := schema.get(key), list) and found:
                return " | ".join(self.value(one, root, depth + 1, within) for one in found)
        rules = [self._of_type(kind, schema, root, depth) for kind in sorted(types_of(schema))]
        return " | ".join(rules) if rules else self.anything()

    def members(self, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> str:
        """A rule for an object's members, in the order of their declaration, with the required ones."""
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, list):
            raise RequestError(
                f"A schema has properties {describe(properties)} and requires {describe(required)}.",
                remedy="Give a JSON schema, whose properties are an object and required a list.",
                param="tools",
            )
        first = tail = self.new('""')
        for key in reversed(properties):
            member = f"{self._writer.text(f'{key}:')} {self.value(properties[key], root, depth + 1)}"
            if key in required:
                first = self.new(f"{member} {tail}")
                tail = self.new(f'"," {member} {tail}')
            else:
                first = self.new(f"{member} {tail} | {first}")
                tail = self.new(f'("," {member})? {tail}')
        return first

    def anything(self) -> str:
        if not self._any:
            self._any = "any_value"
            string, number = self._string(), self._writer.json({"type": ["number", "boolean", "null"]})
            many = f"{_listed('[', self._any, ']')} | {_listed('{', 'any_member', '}')}"
            self.lines += [
                f"any_scalar: {number}",
                f'any_member: /[A-Za-z0-9_.$-]+/ ":" {self._any}',
                f"{self._any}: any_scalar | {string} | {many}",
            ]
        return self._any

    def _of_type(self, kind: str, schema: Mapping[str, Any], root: Mapping[str, Any], depth: int) -> str:
        match kind:
            case "string":
                return self._string()
            case "array":
                return self.new(_listed("[", self.value(schema.get("items"), root, depth + 1), "]"))
            case "object" if schema.get("properties"):
                return self.new(f'"{{" {self.members(schema, root, depth)} "}}"')
            case "object":
                self.anything()
                return self.new(_listed("{", "any_member", "}"))
        return self.new(self._writer.json({**schema, "type": kind}))

    def _string(self) -> str:
        text = f"text_{self._num_rules}"
        self.lines.append(self._writer.up_to(text, _QUOTE))
        return self.new(f"{self._writer.text(_QUOTE)} {text}")

    def _exactly(self, value: Any) -> str:
        return self._writer.text("".join(_as_written(value)))


def _listed(start: str, item: str, end: str) -> str:
    return f'"{start}" ({item} ("," {item})*)? "{end}"'


def _as_written(value: Any) -> Iterator[str]:
    """A value as the format has it."""
    if isinstance(value, str):
        yield f"{_QUOTE}{value}{_QUOTE}"
    elif isinstance(value, Mapping):
        members = (f"{key}:{''.join(_as_written(value[key]))}" for key in sorted(value))
        yield f"{{{','.join(members)}}}"
    elif isinstance(value, Sequence):
        yield f"[{','.join(''.join(_as_written(item)) for item in value)}]"
    else:
        yield written(value)


def _resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """A schema, or the one that it refers to by `#/$defs/…`."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str):
            break
        schema = root
        for key in reference.removeprefix("#/").split("/"):
            schema = schema.get(key) if isinstance(schema, Mapping) else None
    return schema


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    rules = _Rules(writer)
    lines = [f"calls: call{' call*' if parallel else ''}"]
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        schema = schema_of(tool)
        if schema.get("properties") or schema.get("additionalProperties") is False:
            members = rules.members(schema, schema, 0)
        else:
            rules.anything()
            members = rules.new('(any_member ("," any_member)*)?')
        before, after = writer.text(f"{_START}{_CALL}{name_of(tool)}{{"), writer.text(f"}}{_END}")
        lines.append(f"call_{index}: {before} {members} {after}")
    return "\n".join([*lines, *rules.lines]) + "\n"


def _recognizes(template: str) -> bool:
    return _START + _CALL in template


FORMAT = ToolFormat("gemma", (_START, _END, _QUOTE), _recognizes, _read, _grammar, opening=_START)
