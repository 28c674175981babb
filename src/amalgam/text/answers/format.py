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
    pattern_of,
)
from amalgam.text.answers.reading import Reader
from amalgam.text.grammar import Grammar, as_rule

_SPACES = r"/\s{0,16}/"  # between reasoning and what follows


@dataclass(frozen=True)
class _BehindOpening(GrammarWriter):
    """Writes calls without their opening, which has been there."""

    opening: str = ""

    def text(self, text: str) -> str:
        return super().text(text.removeprefix(self.opening))


@dataclass(frozen=True)
class AnswerFormat:
    """How one model writes answers.

    Attributes:
        tags: around reasoning; None if it has none, or the tool format sets it apart by itself, or it stays content.
        special_tokens: the tokenizer's, by id.
        content_tags: around reasoning that stays content.
    """

    tool_format: ToolFormat
    tags: Tags | None
    special_tokens: Mapping[int, str] = field(default_factory=dict)
    content_tags: Tags | None = None

    @property
    def name(self) -> str:
        return self.tool_format.name

    @property
    def marks_calls(self) -> bool:
        """Whether a call can be told from other text by what it begins with."""
        return bool(self.tool_format.opening)

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether answers can only be taken apart with special tokens in their text."""
        marks = {*self.tool_format.marks, *(self.tags or ())}
        return not marks.isdisjoint(self.special_tokens.values())

    @property
    def thought(self) -> Tags | None:
        """What stands around reasoning, set apart or not; None: the model has none."""
        return self.tags or self.tool_format.thought or self.content_tags

    def parser(self, tools: Tools | None = None, *, reasoning: bool = True, prompt_end: str = "") -> AnswerParser:
        """A parser for one answer.

        Args:
            tools: those that the request offers; without any, nothing is taken for a call.
            reasoning: set reasoning apart; otherwise it is content, tags included.
            prompt_end: the last text of the prompt, special tokens included, which may open reasoning.
        """
        opens = self.opens_reasoning(prompt_end)

        def read(reader: Reader, answer: Answer) -> Reading:
            if self.tags is not None and reasoning:
                yield from _read_reasoning(reader, answer, self.tags, opens=opens)
            if answer.tools or self.tool_format.reasons or self.tool_format.frames_content:
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
        writer = self._writer()
        calls = self.tool_format.grammar(writer, chosen, parallel)
        if self.tags is None:
            return Grammar("lark", f"start: calls\n{calls}")
        opens = self.opens_reasoning(prompt_end)
        thought = "thought" if opens else f"{writer.text(self.tags.start)} thought"
        first = f"{thought} {_SPACES} calls" if opens else f"calls | {thought} {_SPACES} calls"
        return Grammar("lark", f"start: {first}\n{writer.up_to('thought', self.tags.end)}\n{calls}")

    def free_grammar(self, tools: Tools, *, parallel: bool = True, prompt_end: str = "") -> Grammar:
        """What an answer may be that calls tools as it likes: any text, and calls that fit the tools' schemas.

        Args:
            parallel: whether anything may follow a call.

        Raises:
            UnsupportedError: nothing tells where a call begins.
        """
        opening = self.tool_format.opening
        if not opening:
            raise UnsupportedError(
                f"Calls are to follow their schemas wherever they are made, and {self.name} has no mark for them.",
                remedy="Demand a call with tool_choice, or leave out strict.",
                param="tools",
            )
        writer = self._writer()
        call = self.tool_format.grammar(_BehindOpening(writer.special_ids, opening), tools, False)
        rules = ["free: (opening calls)* TEXT?" if parallel else "free: TEXT? | opening calls", call]
        rules += self._text_rules(writer)
        first = "free"
        if self.tags is not None and self.opens_reasoning(prompt_end):
            first = "thought free"
            rules.append(writer.up_to("thought", self.tags.end))
        elif self.tags is not None and any(self.tags.start.startswith(text) for text in writer.special_ids):
            first = f"free | {writer.text(self.tags.start)} thought free"
            rules.append(writer.up_to("thought", self.tags.end))
        elif self.tags is not None:  # only what comes first tells its characters from other text
            start, end = map(pattern_of, self.tags)
            first = f"FIRST_TEXT? | first_opening calls{' free' if parallel else ''} | thought free"
            rules.append(f"thought[lazy]: /\\s*{start}(?s:.*){end}/")
            rules += self._text_rules(writer, "first_", f"\\s*{start}(?s:.*)")
        return Grammar("lark", "\n".join([f"start: {first}", *rules]))

    def _text_rules(self, writer: GrammarWriter, prefix: str = "", other: str = "") -> list[str]:
        """Rules for text without a call, `TEXT`, and for what comes up to a call's opening, `opening`.

        Args:
            prefix: of their names.
            other: a regular expression of texts that are neither.
        """
        opening, short = self.tool_format.opening, self.tool_format.short_openings
        text_name = f"{prefix}text".upper()

        def without(marks: tuple[str, ...]) -> str:
            patterns = [f"(?s:.*({'|'.join(map(pattern_of, marks))}).*)"] if marks else []
            return "".join(f" & ~/{pattern}/" for pattern in [*patterns, *([other] if other else [])])

        if opening in writer.special_ids:
            text, before = without(short), f"{prefix}opening: {text_name}? {writer.text(opening)}"
        else:
            text = without((opening, *short))
            before = f"{prefix}opening[lazy]: /(?s:.*){pattern_of(opening)}/{without(short)}"
        return [f"{text_name}: /(?s:.+)/{text}", before]

    def form_or_calls(self, grammar: Grammar, tools: Tools, *, parallel: bool = True, prompt_end: str = "") -> Grammar:
        """What an answer may be that either follows `grammar` or calls tools. See `after_reasoning`."""
        content = self._as_rule(grammar)
        calls = self.tool_format.grammar(self._writer(), tools, parallel)
        rules = f"content: {content}\n{calls}"
        if self.tags is None or not self.opens_reasoning(prompt_end):
            return Grammar("lark", f"start: content | calls\n{rules}")
        thought = self._writer().up_to("thought", self.tags.end)
        return Grammar("lark", f"start: thought {_SPACES} (content | calls)\n{thought}\n{rules}")

    def _writer(self) -> GrammarWriter:
        return GrammarWriter({text: token_id for token_id, text in self.special_tokens.items()})

    def _as_rule(self, grammar: Grammar) -> str:
        content = as_rule(grammar)
        if content is None:
            raise UnsupportedError(
                f"A {grammar.kind} is asked for, and the model may think or call a tool before.",
                remedy="Give a JSON schema or a choice, offer no tools, or let the template open no reasoning.",
            )
        return content

    def after_reasoning(self, grammar: Grammar, prompt_end: str = "") -> Grammar:
        """What an answer may be whose content has to follow `grammar`, where the prompt opens reasoning before it.

        Raises:
            UnsupportedError: the two cannot be put together.
        """
        if self.tool_format.reasons:
            raise UnsupportedError(
                f"A form for the answer is asked for, and {self.name} writes its own around it.",
                remedy="Describe the form in the prompt, or use a tool with tool_choice.",
            )
        if self.tags is None or not self.opens_reasoning(prompt_end):
            return grammar
        content, writer = self._as_rule(grammar), self._writer()
        thought = writer.up_to("thought", self.tags.end)
        return Grammar("lark", f"start: thought {_SPACES} content\n{thought}\ncontent: {content}")

    def opens_reasoning(self, prompt_end: str) -> bool:
        """Whether an answer to a prompt that ends so begins inside of its reasoning."""
        return self.thought is not None and prompt_end.rstrip().endswith(self.thought.start)


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
