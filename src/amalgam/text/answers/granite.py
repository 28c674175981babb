"""The format of tool calls of Granite 3 and Phi-4-mini.

In: `<|tool_call|>[{"name": …, "arguments": {…}}, …]`, of Phi-4-mini with `<|/tool_call|>` behind it. Out: calls.
"""

from __future__ import annotations

from amalgam.text.answers.calls import Found, grammar_of_calls, read_call, read_calls
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_START, _END = "<|tool_call|>", "<|/tool_call|>"


def _read(reader: Reader, answer: Answer) -> Reading:
    while (yield from reader.until([_START], answer.content)):
        reader.remember()
        yield from reader.spaces()
        is_list = (yield from reader.accept("[")) is not None
        found = yield from read_calls(reader, answer) if is_list else read_call(reader, answer)
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
    return f"calls: {writer.text(_START + '[')} list {writer.text(']')}\n" + rules.replace("calls:", "list:", 1)


def _recognizes(template: str) -> bool:
    return _START in template or "<|/tool|>" in template


FORMAT = ToolFormat("granite", (_START, _END), _recognizes, _read, _grammar, opening=_START)
