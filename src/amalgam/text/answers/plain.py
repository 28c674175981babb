"""Answers of models without tools: all of it is content.

In: text. Out: content.
"""

from __future__ import annotations

from amalgam.errors import RequestError
from amalgam.text.answers.contract import Answer, GrammarWriter, Reading, ToolFormat, Tools
from amalgam.text.answers.reading import Reader


def _read(reader: Reader, answer: Answer) -> Reading:
    yield from reader.until((), answer.content)


def _grammar(writer: GrammarWriter, tools: Tools, parallel: bool) -> str:
    raise RequestError(
        "This server reads no tool calls.", remedy="Set server.tool_parser to the format that the model writes."
    )


FORMAT = ToolFormat("plain", (), lambda template: False, _read, _grammar)
