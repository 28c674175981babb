"""Hermes' format of tool calls, which Qwen 2.5 and 3 and many others have.

In: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Out: calls.
"""

from __future__ import annotations

from amalgam.text.answers.calls import Found, grammar_of_calls, read_call
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_START, _END = "<tool_call>", "</tool_call>"


def _read(reader: Reader, answer: Answer) -> Reading:
    while (yield from reader.until([_START], answer.content)):
        reader.remember()
        yield from reader.spaces()
        found = yield from read_call(reader, answer)
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
    before = f'{_START}\n{{"name": "{{name}}", "arguments": '
    return grammar_of_calls(writer, tools, parallel, before, f"}}\n{_END}")


def _recognizes(template: str) -> bool:
    return _START in template and not any(other in template for other in ("<arg_key>", "<function="))


FORMAT = ToolFormat("hermes", (_START, _END), _recognizes, _read, _grammar, opening=_START)
