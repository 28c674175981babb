"""The format of tool calls of GLM 4.5 and later.

In: `<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`, with line ends between. Values are
text of the types that the tool declares. Out: calls.
"""

from __future__ import annotations

from amalgam.text.answers.calls import TypedArguments, grammar_of_typed_calls, held_until, is_name
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_START, _END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END = "<arg_key>", "</arg_key>"
_VALUE, _VALUE_END = "<arg_value>", "</arg_value>"


def _read(reader: Reader, answer: Answer) -> Reading:
    while (yield from reader.until([_START], answer.content)):
        reader.remember()
        name, mark = yield from held_until(reader, [_KEY, _END])
        read = reader.forget()
        if mark is None or not is_name(name.strip()):
            answer.content(_START + read)
            continue
        arguments = TypedArguments(answer, name.strip())
        while mark == _KEY:
            key, _ = yield from held_until(reader, [_KEY_END])
            yield from reader.spaces()
            yield from reader.accept(_VALUE)
            value, end = yield from held_until(reader, [_VALUE_END, _END])
            arguments.add(key.strip(), value, is_whole=end is not None)
            if end != _VALUE_END:
                mark = end
                break
            yield from reader.spaces()
            mark = yield from reader.accept(_KEY, _END)
        if mark is not None or reader.text:
            arguments.finish()
        answer.end_part()


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    argument = (f"{_KEY}{{key}}{_KEY_END}\n{_VALUE}", f"{_VALUE_END}\n")
    return grammar_of_typed_calls(writer, tools, parallel, f"{_START}{{name}}\n", argument, _END)


def _recognizes(template: str) -> bool:
    return _KEY in template


FORMAT = ToolFormat(
    "glm", (_START, _END, _KEY, _KEY_END, _VALUE, _VALUE_END), _recognizes, _read, _grammar, opening=_START
)
