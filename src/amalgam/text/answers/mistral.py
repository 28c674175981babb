"""Mistral's formats of tool calls.

In: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, or since 2025 `[TOOL_CALLS]name[ARGS]{…}` for each call. Out:
calls, whose ids are nine letters and digits, which the templates insist on.
"""

from __future__ import annotations

import secrets
import string

from amalgam.text.answers.calls import Found, grammar_of_calls, held_until, is_name, read_call, read_calls
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader, Waiting

_CALLS, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ALPHABET = string.ascii_letters + string.digits


def _read(reader: Reader, answer: Answer) -> Reading:
    while (yield from reader.until([_CALLS], answer.content)):
        reader.remember()
        yield from reader.spaces()
        if (yield from reader.accept("[")):
            found = yield from read_calls(reader, answer)
        elif reader.text.startswith("{"):
            found = yield from read_call(reader, answer)
        else:
            found = yield from _read_named(reader, answer)
        read = reader.forget()
        if found is Found.NO_CALL:
            answer.content(_CALLS + read)
            continue
        if found is Found.BROKEN:
            yield from _rest(reader, answer)
            continue
        answer.end_part()


def _rest(reader: Reader, answer: Answer) -> Reading:
    """What is broken goes on to the end."""
    yield from reader.until((), answer.arguments)


def _read_named(reader: Reader, answer: Answer) -> Waiting[Found]:
    name, mark = yield from held_until(reader, [_ARGUMENTS, _ID, "{"])
    if mark is None or not is_name(name.strip()):
        return Found.NO_CALL
    if mark == _ID:
        _, mark = yield from held_until(reader, [_ARGUMENTS, "{"])
        if mark is None:
            return Found.NO_CALL
    if mark == "{":
        reader.put_back("{")
    yield from reader.spaces()
    if not reader.text.startswith("{"):
        return Found.NO_CALL
    answer.call(name.strip())
    return Found.CALL if (yield from reader.json_value(answer.arguments)) else Found.BROKEN


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    if _ARGUMENTS in writer.special_ids:
        return grammar_of_calls(writer, tools, parallel, f"{_CALLS}{{name}}{_ARGUMENTS}", "", between="")
    rules = grammar_of_calls(writer, tools, parallel, '{"name": "{name}", "arguments": ', "}", between=", ")
    return f"calls: {writer.text(_CALLS + '[')} list {writer.text(']')}\n" + rules.replace("calls:", "list:", 1)


def _recognizes(template: str) -> bool:
    return _CALLS in template


def _new_id() -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(9))


FORMAT = ToolFormat("mistral", (_CALLS, _ARGUMENTS, _ID), _recognizes, _read, _grammar, _new_id)
