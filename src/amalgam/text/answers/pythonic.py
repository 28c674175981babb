"""Tool calls as a list of Python's calls, as Llama 3.2 and 4 are told to write them, and LFM2.

In: an answer that begins with `[f(city="…", days=3), now()]`, perhaps between `<|python_start|>` and `<|python_end|>`;
or an answer with such lists between `<|tool_call_start|>` and `<|tool_call_end|>` (LFM2).
Out: calls of the request's tools; any other list is content.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from amalgam.text.answers.calls import written
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools, name_of, schema_of
from amalgam.text.answers.reading import Reader, Waiting

_START, _END = "<|python_start|>", "<|python_end|>"
_SHOWN = "[func_name1("  # how the templates say it
_LFM2_START, _LFM2_END = "<|tool_call_start|>", "<|tool_call_end|>"
_LFM2_SHOWN = ("<|tool_list_start|>", _LFM2_START)
_PAIRS = {")": "(", "]": "[", "}": "{"}
_NAME_CHARS = r"[\w.$@/-]"
# A string, which is passed over, or the name of a function or an argument.
_STRING_OR_NAME = re.compile(
    r'"""(?:\\.|[^\\])*?"""'
    r"|\'\'\'(?:\\.|[^\\])*?\'\'\'"
    r'|"(?:\\.|[^"\\])*"'
    r"|'(?:\\.|[^'\\])*'"
    rf"|(?<!{_NAME_CHARS})(?P<name>{_NAME_CHARS}++)(?=\s*[(=])",
    re.DOTALL,
)


def _read(reader: Reader, answer: Answer) -> Reading:
    spaces = yield from reader.spaces()
    if reader.text.startswith("["):
        yield from _read_calls(reader, answer, "", _END)
    else:
        answer.content(spaces)
    while (yield from reader.until([_START], answer.content)):
        yield from _read_calls(reader, answer, _START, _END)


def _read_lfm2(reader: Reader, answer: Answer) -> Reading:
    while (yield from reader.until([_LFM2_START], answer.content)):
        yield from _read_calls(reader, answer, _LFM2_START, _LFM2_END)


def _read_calls(reader: Reader, answer: Answer, before: str, end: str) -> Waiting[None]:
    reader.remember()
    yield from reader.spaces()
    is_whole = yield from _read_brackets(reader)
    read = reader.forget()
    names = {name_of(tool) for tool in answer.tools}
    calls = _calls_of(read) if is_whole else None
    if not calls or not all(name in names for name, _ in calls):
        answer.content(before + read)
        return
    for name, arguments in calls:
        answer.call(name)
        answer.arguments(arguments)
        answer.end_part()
    yield from reader.spaces()
    yield from reader.accept(end)


def _read_brackets(reader: Reader) -> Waiting[bool]:
    """Read up to where the first bracket is closed; False: that never comes."""
    stack: list[str] = []
    quote, is_escaped = "", False
    while reader.text or (yield from reader.more()):
        char = reader.take(1)
        if quote:
            quote = "" if char == quote and not is_escaped else quote
            is_escaped = char == "\\" and not is_escaped
            continue
        if char in "\"'":
            quote = char
        elif char in "([{":
            stack.append(char)
        elif char in _PAIRS and (not stack or stack.pop() != _PAIRS[char]):
            return False
        if not stack:
            return char == "]"
    return False


def _calls_of(text: str) -> list[tuple[str, str]] | None:
    """Names and arguments as JSON; None: this is something else than a list of calls. Nothing is run."""
    names: dict[str, str] = {}

    def named(match: re.Match[str]) -> str:
        if match["name"] is None:
            return match[0]
        placeholder = f"_{len(names)}"
        names[placeholder] = match["name"]
        return placeholder

    try:
        # Tools and arguments may be called what no name in Python is: `get-weather`, `from`.
        parsed = ast.parse(_STRING_OR_NAME.sub(named, text.strip()), mode="eval").body
        if not isinstance(parsed, ast.List):
            return None
        return [_call_of(call, names) for call in parsed.elts]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _call_of(call: ast.expr, names: Mapping[str, str]) -> tuple[str, str]:
    """
    Raises:
        ValueError, TypeError: it is no call whose arguments JSON can hold.
    """
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        name = None if keyword.arg is None else names[keyword.arg]
        if name is None or name in arguments:
            raise ValueError
        arguments[name] = _value(keyword.value)
    return names[call.func.id], written(arguments)


_CONSTANTS = {"true": True, "false": False, "null": None}


def _value(node: ast.expr) -> Any:
    """A literal of Python, or one of JSON."""
    match node:
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            if None in keys:  # `**` and another
                raise ValueError
            return {_value(key): _value(value) for key, value in zip(keys, values, strict=True) if key}
    return ast.literal_eval(node)


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool, before: str = "", behind: str = "") -> str:
    more = f" ({writer.text(', ')} call)*" if parallel else ""
    lines = [f"calls: {writer.text(before + '[')} call{more} {writer.text(']' + behind)}"]
    lines.append("call: " + " | ".join(f"call_{index}" for index in range(len(tools))))
    for index, tool in enumerate(tools):
        lines.append(f"call_{index}: {writer.text(name_of(tool) + '(')} first_{index}_0 {writer.text(')')}")
        lines += _arguments(writer, index, schema_of(tool))
    return "\n".join(lines) + "\n"


def _arguments(writer: GrammarWriter, index: int, schema: Mapping[str, Any]) -> list[str]:
    """Rules `first_i` and `next_i`: the arguments from the ith on, where none and where some come before."""
    properties, required = schema.get("properties") or {}, schema.get("required") or []
    assert isinstance(properties, Mapping) and isinstance(required, Sequence)
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    lines = []
    for place, (key, value) in enumerate(properties.items()):
        argument, behind = f"argument_{index}_{place}", f"next_{index}_{place + 1}"
        for kind, separator in (("first", ""), ("next", f"{writer.text(', ')} ")):
            without = "" if key in required else f" | {kind}_{index}_{place + 1}"
            lines.append(f"{kind}_{index}_{place}: {separator}{argument} {behind}{without}")
        own = {**definitions, **value} if isinstance(value, dict) else {}
        lines.append(f"{argument}: {writer.text(f'{key}=')} {argument}_value")
        lines.append(f"{argument}_value: {writer.json(own)}")
    return lines + [f'{kind}_{index}_{len(properties)}: ""' for kind in ("first", "next")]


def _recognizes(template: str) -> bool:
    return _SHOWN in template


def _lfm2_grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    return _grammar(writer, tools, parallel, _LFM2_START, _LFM2_END)


def _recognizes_lfm2(template: str) -> bool:
    return any(mark in template for mark in _LFM2_SHOWN)


FORMATS = (
    ToolFormat("pythonic", (_START, _END), _recognizes, _read, _grammar),
    ToolFormat("lfm2", (_LFM2_START, _LFM2_END), _recognizes_lfm2, _read_lfm2, _lfm2_grammar, opening=_LFM2_START),
)
