"""The format of tool calls of Hunyuan A13B.

In: `<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>`. Out: calls.
"""

from __future__ import annotations

from amalgam.text.answers.calls import Found, grammar_of_calls, read_calls
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_START, _END = "<tool_calls>", "</tool_calls>"


def _read(reader: Reader, answer: Answer) -> Reading:
    while (yield from reader.until([_START], answer.content)):
        reader.remember()
        yield from reader.spaces()
        is_list = yield from reader.accept("[")
        found = (yield from read_calls(reader, answer)) if is_list else Found.NO_CALL
        read = reader.forget()
        if found is Found.NO_CALL:
            answer.content(_START + read)
            continue
        if found is Found.BROKEN:
            yield from reader.until([_END], answer.arguments)
        else:
            yield from reader.spaces()
            yield from reader.accept(_END)
        answer.end_part()


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    rules = grammar_of_calls(writer, tools, parallel, '{"name": "{name}", "arguments": ', "}", between=", ")
    return f"calls: {writer.text(_START + '[')} list {writer.text(']' + _END)}\n" + rules.replace("calls:", "list:", 1)


def _recognizes(template: str) -> bool:
    return _START in template


FORMAT = ToolFormat("hunyuan", (_START, _END), _recognizes, _read, _grammar, opening=_START)
