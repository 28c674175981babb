"""The format of tool calls of Qwen3-Coder, Qwen 3.5 and later.

In: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, with line ends between. Values
are text of the types that the tool declares. Out: calls.
"""

from __future__ import annotations

from amalgam.text.answers.calls import TypedArguments, grammar_of_typed_calls, held_until, is_name
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_START, _END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


def _read(reader: Reader, answer: Answer) -> Reading:
    while mark := (yield from reader.until([_START, _FUNCTION], answer.content)):
        reader.remember()
        is_call = mark == _FUNCTION
        if not is_call:
            yield from reader.spaces()
            is_call = (yield from reader.accept(_FUNCTION)) is not None
        name, closing = (yield from held_until(reader, [">"])) if is_call else ("", None)
        read = reader.forget()
        if closing is None or not is_name(name):
            answer.content(mark + read)
            continue
        yield from _read_arguments(reader, TypedArguments(answer, name))
        yield from reader.spaces()
        yield from reader.accept(_END)
        answer.end_part()


def _read_arguments(reader: Reader, arguments: TypedArguments) -> Reading:
    while True:
        yield from reader.spaces()
        if not (yield from reader.accept(_PARAMETER)):
            break
        key, _ = yield from held_until(reader, [">"])
        value, end = yield from held_until(reader, [_PARAMETER_END, _FUNCTION_END])
        arguments.add(key, value.removeprefix("\n").removesuffix("\n"), is_whole=end is not None)
        if end is None:
            return
        if end == _FUNCTION_END:
            arguments.finish()
            return
    if (yield from reader.accept(_FUNCTION_END)) or reader.text:
        arguments.finish()


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    argument = (f"{_PARAMETER}{{key}}>\n", f"\n{_PARAMETER_END}\n")
    before, after = f"{_START}\n{_FUNCTION}{{name}}>\n", f"{_FUNCTION_END}\n{_END}"
    return grammar_of_typed_calls(writer, tools, parallel, before, argument, after)


def _recognizes(template: str) -> bool:
    return _FUNCTION in template and _PARAMETER in template


FORMAT = ToolFormat(
    "qwen_xml", (_START, _END), _recognizes, _read, _grammar, opening=_START, short_openings=(_FUNCTION,)
)
