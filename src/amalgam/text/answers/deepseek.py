"""DeepSeek's formats of tool calls.

In: between marks of their own, `function<sep>name`, a line end and the arguments as a block of JSON (V3 and R1), or
`name<sep>` and the arguments (V3.1). Out: calls.
"""

from __future__ import annotations

from amalgam.text.answers.calls import grammar_of_calls, held_until, is_name
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader, Waiting

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_SEPARATOR = "<｜tool▁sep｜>"
_KIND, _FENCE = "function", "```"


def _read(reader: Reader, answer: Answer) -> Reading:
    while mark := (yield from reader.until([_CALLS, _CALL], answer.content)):
        reader.remember()
        if mark == _CALLS:
            yield from reader.spaces()
            if not (yield from reader.accept(_CALL)):
                answer.content(mark + reader.forget())
                continue
        name = yield from _read_name(reader)
        read = reader.forget()
        if name is None:
            answer.content(mark + read)
            continue
        answer.call(name)
        if (yield from reader.json_value(answer.arguments)):
            yield from reader.spaces()
            yield from reader.accept(_FENCE)
            yield from reader.spaces()
            yield from reader.accept(_CALL_END)
        else:
            yield from reader.until([_CALL_END], answer.arguments)
        yield from reader.spaces()
        yield from reader.accept(_CALLS_END)
        answer.end_part()


def _read_name(reader: Reader) -> Waiting[str | None]:
    """Up to where the arguments begin; None: this is no call."""
    name, mark = yield from held_until(reader, [_SEPARATOR])
    if mark is not None and name.strip() == _KIND:
        name, mark = yield from held_until(reader, ["\n"])
    yield from reader.spaces()
    if (yield from reader.accept(_FENCE + "json", _FENCE)):
        yield from reader.spaces()
    is_call = mark is not None and is_name(name.strip()) and reader.text.startswith("{")
    return name.strip() if is_call else None


def _grammar_v3(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    before = f"{_CALL}{_KIND}{_SEPARATOR}{{name}}\n{_FENCE}json\n"
    return _between_marks(writer, grammar_of_calls(writer, tools, parallel, before, f"\n{_FENCE}{_CALL_END}"))


def _grammar_v31(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    before = f"{_CALL}{{name}}{_SEPARATOR}"
    return _between_marks(writer, grammar_of_calls(writer, tools, parallel, before, _CALL_END, between=""))


def _between_marks(writer: GrammarWriter, rules: str) -> str:
    return f"calls: {writer.text(_CALLS)} list {writer.text(_CALLS_END)}\n" + rules.replace("calls:", "list:", 1)


def _recognizes_v3(template: str) -> bool:
    return _CALLS in template and _FENCE in template


def _recognizes_v31(template: str) -> bool:
    return _CALLS in template and _FENCE not in template


_MARKS = (_CALLS, _CALLS_END, _CALL, _CALL_END, _SEPARATOR)
FORMATS = (
    ToolFormat("deepseek", _MARKS, _recognizes_v3, _read, _grammar_v3),
    ToolFormat("deepseek_v31", _MARKS, _recognizes_v31, _read, _grammar_v31),
)
