"""The format of gpt-oss, OpenAI's "harmony": messages with a channel and a recipient.

In: `<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…`. Out: what is for the user
and what goes to a function; the channel `analysis` is reasoning.

The specification is https://cookbook.openai.com/articles/openai-harmony. openai-harmony has a parser too, of token ids:
it needs OpenAI's vocabulary, which it downloads, and a checkpoint may have another.
"""

from __future__ import annotations

import re

from amalgam.text.answers.calls import grammar_of_calls, held_until
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, Tags, ToolFormat, Tools
from amalgam.text.answers.reading import Emit, Reader

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_CONSTRAIN = "<|constrain|>"
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


def _read(reader: Reader, answer: Answer) -> Reading:
    while True:
        reader.remember()
        yield from reader.spaces()
        is_message = (yield from reader.accept(_START, _CHANNEL, "to=")) is not None
        _, mark = (yield from held_until(reader, [_MESSAGE])) if is_message else ("", None)
        read = reader.forget()
        if mark is None:
            answer.content(read)
            emit: Emit = answer.content
        else:
            emit = _begin(answer, read)
        end = yield from reader.until([*_ENDS, _START], emit)
        if end is None:
            return
        if end == _START:  # of the next message; this one has no end
            reader.put_back(_START)
        answer.end_part()


def _begin(answer: Answer, header: str) -> Emit:
    """Where a message goes."""
    recipient = _RECIPIENT.search(header)
    if recipient is not None and answer.tools and recipient[1].startswith(_FUNCTIONS):
        answer.call(recipient[1].removeprefix(_FUNCTIONS))
        return answer.arguments
    is_analysis = header.partition(_CHANNEL)[2].lstrip().startswith("analysis") or header.startswith("analysis")
    return answer.reasoning if is_analysis and answer.reasons else answer.content


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    before = f"{_CHANNEL}commentary to={_FUNCTIONS}{{name}} {_CONSTRAIN}json{_MESSAGE}"
    thought = f"{writer.text(f'{_CHANNEL}analysis{_MESSAGE}')} thought {writer.text(f'{_START}assistant')}"
    rules = grammar_of_calls(writer, tools, False, before, "<|call|>")  # a call ends an answer
    rules = f"calls: only | {thought} only\n" + rules.replace("calls:", "only:", 1)
    return rules + writer.up_to("thought", "<|end|>") + "\n"


def _recognizes(template: str) -> bool:
    return _CHANNEL in template and _MESSAGE in template


_THOUGHT = Tags(f"{_CHANNEL}analysis{_MESSAGE}", "<|end|>")
_MARKS = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS)
FORMAT = ToolFormat("gpt_oss", _MARKS, _recognizes, _read, _grammar, reasons=True, thought=_THOUGHT)
