"""The format of tool calls of MiniMax M2.

In: `<minimax:tool_call><invoke name="f"><parameter name="key">value</parameter></invoke></minimax:tool_call>`, several
calls in one block, with line ends between. Values are text of the types that the tool declares. Out: calls.
"""

from __future__ import annotations

from amalgam.text.answers.calls import TypedArguments, grammar_of_typed_calls, held_until, is_name
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_START, _END = "<minimax:tool_call>", "</minimax:tool_call>"
_INVOKE, _INVOKE_END = '<invoke name="', "</invoke>"
_PARAMETER, _PARAMETER_END = '<parameter name="', "</parameter>"
_NAMED = '">'


def _read(reader: Reader, answer: Answer) -> Reading:
    while mark := (yield from reader.until([_START, _INVOKE], answer.content)):
        reader.remember()
        is_call = mark == _INVOKE
        if not is_call:
            yield from reader.spaces()
            is_call = (yield from reader.accept(_INVOKE)) is not None
        name, closing = (yield from held_until(reader, [_NAMED])) if is_call else ("", None)
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
        key, _ = yield from held_until(reader, [_NAMED])
        value, end = yield from held_until(reader, [_PARAMETER_END, _INVOKE_END])
        arguments.add(key, value, is_whole=end is not None)
        if end is None:
            return
        if end == _INVOKE_END:
            arguments.finish()
            return
    if (yield from reader.accept(_INVOKE_END)) or reader.text:
        arguments.finish()


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    argument = (f"{_PARAMETER}{{key}}{_NAMED}", f"{_PARAMETER_END}\n")
    rules = grammar_of_typed_calls(writer, tools, parallel, f"{_INVOKE}{{name}}{_NAMED}\n", argument, _INVOKE_END)
    around = writer.text(f"{_START}\n"), writer.text(f"\n{_END}")
    return f"calls: {around[0]} list {around[1]}\n" + rules.replace("calls:", "list:", 1)


def _recognizes(template: str) -> bool:
    return _START in template


FORMAT = ToolFormat("minimax", (_START, _END), _recognizes, _read, _grammar, opening=_START, short_openings=(_INVOKE,))
