"""The format of tool calls of Llama 3 and 4.

In: an answer that begins with `{"name": …, "parameters": {…}}`, or has it after `<|python_tag|>` or, Llama 4, between
`<|python_start|>` and `<|python_end|>`; several stand one after the other, with semicolons or lines between; or
`<function=name>{…}</function>`. Out: calls of the request's tools; any other JSON is content.
"""

from __future__ import annotations

from amalgam.text.answers.calls import Found, grammar_of_calls, held_until, is_name, read_call
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools, name_of
from amalgam.text.answers.reading import Reader, Waiting

_TAG, _START, _END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"


def _read(reader: Reader, answer: Answer) -> Reading:
    spaces = yield from reader.spaces()
    if not reader.text.startswith("{"):
        answer.content(spaces)
    else:
        yield from _read_calls(reader, answer, "")
    while mark := (yield from reader.until([_TAG, _START, _FUNCTION], answer.content)):
        if mark in (_TAG, _START):
            if (yield from _read_calls(reader, answer, mark)):
                yield from reader.accept(_END)
        else:
            yield from _read_function(reader, answer)


def _read_calls(reader: Reader, answer: Answer, before: str) -> Waiting[bool]:
    """One call after the other; what is none is content, with what stands `before` it. Returns whether all were."""
    names = {name_of(tool) for tool in answer.tools}
    while True:
        reader.remember()
        yield from reader.spaces()
        found = yield from read_call(reader, answer, names)
        read = reader.forget()
        if found is Found.NO_CALL:
            answer.content(before + read)
            return False
        if found is Found.BROKEN:
            yield from reader.until((), answer.arguments)
            return False
        answer.end_part()
        before = ""
        yield from reader.spaces()
        yield from reader.accept(";")
        yield from reader.spaces()
        if not reader.text.startswith("{"):
            return True


def _read_function(reader: Reader, answer: Answer) -> Waiting[None]:
    reader.remember()
    name, closing = yield from held_until(reader, [">"])
    yield from reader.spaces()
    read = reader.forget()
    if closing is None or not is_name(name) or not reader.text.startswith("{"):
        answer.content(_FUNCTION + read)
        return
    answer.call(name)
    if (yield from reader.json_value(answer.arguments)):
        yield from reader.accept(_FUNCTION_END)
    else:
        yield from reader.until([_FUNCTION_END], answer.arguments)
    answer.end_part()


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    return grammar_of_calls(writer, tools, parallel, '{"name": "{name}", "parameters": ', "}", between="; ")


def _recognizes(template: str) -> bool:
    is_llama = any(header in template for header in ("<|start_header_id|>", "<|header_start|>"))
    return _TAG in template or (is_llama and '"parameters": ' in template)


FORMAT = ToolFormat("llama", (_TAG, _START, _END), _recognizes, _read, _grammar)
