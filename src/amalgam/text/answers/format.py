"""One model's answers: the format of its tool calls and the tags around its reasoning put together.

In: a `ToolFormat`, tags, the tokenizer's special tokens. Out: parsers and grammars. Must never know: requests, HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from amalgam.errors import RequestError, UnsupportedError, describe
from amalgam.text.answers.contract import (
    Answer,
    AnswerParser,
    GrammarWriter,
    Reading,
    Tags,
    ToolFormat,
    Tools,
    name_of,
)
from amalgam.text.answers.reading import Reader
from amalgam.text.grammar import Grammar, as_rule

_SPACES = r"/\s{0,16}/"  # between reasoning and what follows


@dataclass(frozen=True)
class AnswerFormat:
    """How one model writes answers.

    Attributes:
        tags: around reasoning; None if it has none, or the tool format sets it apart by itself.
        special_tokens: the tokenizer's, by id.
    """

    tool_format: ToolFormat
    tags: Tags | None
    special_tokens: Mapping[int, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.tool_format.name

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether answers can only be taken apart with special tokens in their text."""
        marks = {*self.tool_format.marks, *(self.tags or ())}
        return not marks.isdisjoint(self.special_tokens.values())

    def parser(self, tools: Tools | None = None, *, reasoning: bool = True, prompt_end: str = "") -> AnswerParser:
        """A parser for one answer.

        Args:
            tools: those that the request offers; without any, nothing is taken for a call.
            reasoning: set reasoning apart; otherwise it is content, tags included.
            prompt_end: the last text of the prompt, special tokens included, which may open reasoning.
        """
        opens = self._opens_reasoning(prompt_end)

        def read(reader: Reader, answer: Answer) -> Reading:
            if self.tags is not None and reasoning:
                yield from _read_reasoning(reader, answer, self.tags, opens=opens)
            if answer.tools or self.tool_format.reasons:
                yield from self.tool_format.read(reader, answer)
            else:
                yield from reader.until((), answer.content)

        return AnswerParser(Answer(tools or (), self.tool_format.new_id, reasons=reasoning), read)

    def grammar(
        self, tools: Tools, choice: str | None = None, *, parallel: bool = True, prompt_end: str = ""
    ) -> Grammar:
        """What an answer may be that has to call tools. Reasoning may come before the calls.

        Args:
            choice: the name of the tool to be called; None: any of them.
            parallel: whether several calls may follow each other.

        Raises:
            RequestError: there is no such tool.
        """
        chosen = [tool for tool in tools if choice is None or name_of(tool) == choice]
        if not chosen:
            raise RequestError(
                f"tool_choice names {describe(choice)}.",
                remedy=f"Tools of this request: {', '.join(map(name_of, tools)) or 'none'}.",
            )
        writer = GrammarWriter({text: token_id for token_id, text in self.special_tokens.items()})
        calls = self.tool_format.grammar(writer, chosen, parallel)
        if self.tags is None:
            return Grammar("lark", f"start: calls\n{calls}")
        opens = self._opens_reasoning(prompt_end)
        thought = "thought" if opens else f"{writer.text(self.tags.start)} thought"
        first = f"{thought} {_SPACES} calls" if opens else f"calls | {thought} {_SPACES} calls"
        return Grammar("lark", f"start: {first}\n{writer.up_to('thought', self.tags.end)}\n{calls}")

    def after_reasoning(self, grammar: Grammar, prompt_end: str = "") -> Grammar:
        """What an answer may be whose content has to follow `grammar`, where the prompt opens reasoning before it.

        Raises:
            UnsupportedError: the two cannot be put together.
        """
        if self.tool_format.reasons:
            raise UnsupportedError(
                f"A form for the answer is asked for, and {self.name} writes its own around it.",
                remedy="Describe the form in the prompt, or use a tool with tool_choice.",
                param="response_format",
            )
        if self.tags is None or not self._opens_reasoning(prompt_end):
            return grammar
        writer = GrammarWriter({text: token_id for token_id, text in self.special_tokens.items()})
        content = as_rule(grammar)
        if content is None:
            raise UnsupportedError(
                f"A {grammar.kind} is asked for, and the model thinks before it answers.",
                remedy="Give a JSON schema or a choice, or let the template open no reasoning.",
                param="structured_outputs",
            )
        thought = writer.up_to("thought", self.tags.end)
        return Grammar("lark", f"start: thought {_SPACES} content\n{thought}\ncontent: {content}")

    def _opens_reasoning(self, prompt_end: str) -> bool:
        return self.tags is not None and prompt_end.rstrip().endswith(self.tags.start)


def _read_reasoning(reader: Reader, answer: Answer, tags: Tags, *, opens: bool) -> Reading:
    """Reasoning is the first part of an answer, if there is any."""
    if not opens:
        spaces = yield from reader.spaces()
        if not (yield from reader.accept(tags.start)):
            answer.content(spaces)
            return
    yield from reader.accept(tags.start)  # some models write it although the prompt has it
    yield from reader.until([tags.end], answer.reasoning)
    answer.end_part()
