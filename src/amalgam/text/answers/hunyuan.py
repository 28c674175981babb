"""The format of tool calls of Hunyuan A13B.

In: `<tool_calls>[{"name": …, "arguments": {…}}, …]</tool_calls>`, and behind reasoning `<answer>…</answer>` around what
is for the user. Out: calls, and content without that frame.
"""

from __future__ import annotations

from amalgam.text.answers.calls import Found, grammar_of_calls, read_calls
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_START, _END = "<tool_calls>", "</tool_calls>"
_ANSWER, _ANSWER_END = "<answer>", "</answer>"


def _read(reader: Reader, answer: Answer) -> Reading:
    marks = [_START] if answer.tools else []
    spaces = yield from reader.spaces()
    if (yield from reader.accept(_ANSWER)):
        marks.append(_ANSWER_END)
        answer.end_part()
    else:
        answer.content(spaces)
    while mark := (yield from reader.until(marks, answer.content)):
        before = ""
        if mark == _ANSWER_END:  # the frame's only where no more content follows
            before = mark + (yield from reader.spaces())
            if not reader.text:
                answer.end_part()
                return
            if not answer.tools or not (yield from reader.accept(_START)):
                answer.content(before)
                continue
        reader.remember()
        yield from reader.spaces()
        is_list = yield from reader.accept("[")
        found = (yield from read_calls(reader, answer)) if is_list else Found.NO_CALL
        read = reader.forget()
        if found is Found.NO_CALL:
            answer.content(before + _START + read)
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


_MARKS = (_START, _END, _ANSWER, _ANSWER_END)
FORMAT = ToolFormat("hunyuan", _MARKS, _recognizes, _read, _grammar, frames_content=True, opening=_START)
