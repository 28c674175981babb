"""The format of tool calls of Qwen3-Coder, Qwen 3.5 and later, and of Seed-OSS.

In: `<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, with line ends between; of
Seed-OSS `<seed:tool_call>`. Values are text of the types that the tool declares. Out: calls.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from amalgam.text.answers.calls import TypedArguments, grammar_of_typed_calls, held_until, is_name
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, Tags, ToolFormat, Tools
from amalgam.text.answers.reading import Reader

_QWEN, _SEED = Tags("<tool_call>", "</tool_call>"), Tags("<seed:tool_call>", "</seed:tool_call>")
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"


class _Layout(NamedTuple):
    """One family's: what stands around a call, and between a value and the marks around it."""

    name: str
    tags: Tags
    between: str


def _read(tags: Tags, reader: Reader, answer: Answer) -> Reading:
    while mark := (yield from reader.until([tags.start, _FUNCTION], answer.content)):
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
        yield from reader.accept(tags.end)
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


def _grammar(layout: _Layout, writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    (start, end), between = layout.tags, layout.between
    argument = (f"{_PARAMETER}{{key}}>{between}", f"{between}{_PARAMETER_END}\n")
    before, after = f"{start}\n{_FUNCTION}{{name}}>\n", f"{_FUNCTION_END}\n{end}"
    return grammar_of_typed_calls(writer, tools, parallel, before, argument, after)


def _recognizes(tags: Tags, template: str) -> bool:
    is_seed = _SEED.start in template
    return _FUNCTION in template and _PARAMETER in template and is_seed == (tags == _SEED)


FORMATS = tuple(
    ToolFormat(
        layout.name,
        layout.tags,
        partial(_recognizes, layout.tags),
        partial(_read, layout.tags),
        partial(_grammar, layout),
        opening=layout.tags.start,
        short_openings=(_FUNCTION,),
    )
    for layout in (_Layout("qwen_xml", _QWEN, "\n"), _Layout("seed", _SEED, ""))
)
