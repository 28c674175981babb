"""The format of tool calls of Kimi K2.

In: a section between marks of its own, in which each call is `functions.name:index`, a mark and its arguments. Out:
calls, whose ids are those that the model wrote: its template shows them to it again.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection

from amalgam.text.answers.calls import grammar_of_calls, held_until, is_name
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader, Waiting

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
_ARGUMENTS = "<|tool_call_argument_begin|>"
_KIND = "functions."


def _read(reader: Reader, answer: Answer) -> Reading:
    ids: set[str] = set()
    while mark := (yield from reader.until([_SECTION, _CALL], answer.content)):
        reader.remember()
        if mark == _SECTION:
            yield from reader.spaces()
            if not (yield from reader.accept(_CALL)):
                answer.content(mark + reader.forget())
                continue
        header = yield from _read_header(reader)
        read = reader.forget()
        if header is None:
            answer.content(mark + read)
            continue
        call_id = _new_id(*header, ids)
        ids.add(call_id)
        answer.call(header[0], call_id)
        if (yield from reader.json_value(answer.arguments)):
            yield from reader.spaces()
            yield from reader.accept(_CALL_END)
        else:
            yield from reader.until([_CALL_END], answer.arguments)
        yield from reader.spaces()
        yield from reader.accept(_SECTION_END)
        answer.end_part()


def _new_id(name: str, index: str, ids: Collection[str]) -> str:
    """The one that the model wrote, or a free one where it wrote none, or one twice."""
    free = (f"{_KIND}{name}:{number}" for number in itertools.count(len(ids)))
    candidates = itertools.chain([f"{_KIND}{name}:{index}"] if index else [], free)
    return next(candidate for candidate in candidates if candidate not in ids)


def _read_header(reader: Reader) -> Waiting[tuple[str, str] | None]:
    """Name and index, which may be empty, up to where the arguments begin; None: this is no call."""
    written, mark = yield from held_until(reader, [_ARGUMENTS])
    yield from reader.spaces()
    name = written.strip().removeprefix(_KIND)
    stem, _, index = name.rpartition(":")
    name, index = (stem, index) if stem and index.isdecimal() else (name, "")
    return (name, index) if mark is not None and is_name(name) and reader.text.startswith("{") else None


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    lines = grammar_of_calls(writer, tools, parallel, f"{_CALL}{_KIND}{{name}}:", _CALL_END, between="")
    rules = lines.replace(" arguments_", f" /[0-9]+/ {writer.text(_ARGUMENTS)} arguments_")
    return f"calls: {writer.text(_SECTION)} list {writer.text(_SECTION_END)}\n" + rules.replace("calls:", "list:", 1)


def _recognizes(template: str) -> bool:
    return _SECTION in template


FORMAT = ToolFormat("kimi", (_SECTION, _SECTION_END, _CALL, _CALL_END, _ARGUMENTS), _recognizes, _read, _grammar)
