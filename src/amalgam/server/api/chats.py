"""A chat → the deltas of its answer: what the interfaces for chats have in common.

In: a prompt, tools, the form that the answer must have; outputs. Out: token ids and what the answer must follow;
`AnswerDelta`s as they come. Must never know: the shape of any interface.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amalgam.engine.params import ThinkingLimit
from amalgam.engine.request import RequestOutput
from amalgam.errors import RequestError, UnsupportedError, about
from amalgam.server.api.common import Form, ToolUse
from amalgam.server.interface import Tokenizer
from amalgam.server.service import Service
from amalgam.text.answers.contract import (
    AnswerDelta,
    AnswerParser,
    ReasoningDelta,
    ToolCallDelta,
    name_of,
    schema_of,
)
from amalgam.text.answers.format import AnswerFormat
from amalgam.text.answers.parts import arguments_of
from amalgam.text.chat import ChatPrompt
from amalgam.text.grammar import CompiledGrammar, Grammar, check_grammar


@dataclass(frozen=True)
class EncodedChat:
    """A chat that the engine can take.

    Attributes:
        constraint: what the answer must follow.
    """

    prompt_ids: list[int]
    constraint: CompiledGrammar | None
    form: AnswerFormat
    use: ToolUse
    tokenizer: Tokenizer
    prompt_end: str

    def thinking_limit(self, num_tokens: int | None, field: str) -> ThinkingLimit | None:
        """What the engine takes to end reasoning after so many tokens; None: it has no limit, or there is none.

        Args:
            field: of the request, that has the number.

        Raises:
            UnsupportedError: the end of the model's reasoning is not one token, which could be demanded.
        """
        tags = self.form.thought
        if num_tokens is None or tags is None:
            return None
        start_ids, end_ids = _mark_ids(self.tokenizer, tags.start), _mark_ids(self.tokenizer, tags.end)
        if len(end_ids) != 1:
            raise UnsupportedError(
                f"{field} is {num_tokens}, and {tags.end}, which ends this model's reasoning, is no token of its own.",
                remedy="Leave it out, and limit the whole answer.",
                param=field,
            )
        opens = self.form.opens_reasoning(self.prompt_end)
        return ThinkingLimit(num_tokens, end_ids[0], () if opens else start_ids)

    def reader(self, *, separates_reasoning: bool = True) -> AnswerReader:
        """For one answer.

        Args:
            separates_reasoning: otherwise it is content, tags included.
        """
        parser = self.form.parser(self.use.tools, reasoning=separates_reasoning, prompt_end=self.prompt_end)
        return AnswerReader(parser, self.tokenizer, is_parallel=self.use.is_parallel)


async def encode_chat(
    service: Service, prompt: ChatPrompt, use: ToolUse, asked: Form | None, field: str
) -> EncodedChat:
    """
    Args:
        asked: what the answer's content has to look like; None: anything.
        field: of the request, that has the prompt.

    Raises:
        RequestError: see `Service.encode` and `Service.compile_grammar`; or a form is given with tools that have to be
            called, or whose calls cannot be told from it.
        OverloadedError: the queue is full.
    """
    form = service.answer_format
    if asked is not None and use.tools and (use.is_required or not form.marks_calls):
        raise RequestError(
            f"{asked.field} is given with tools.",
            remedy="Give tool_choice none, or no form of the answer: a call would not have it.",
            param=asked.field,
        )
    [prompt_ids] = await service.encode([prompt], field)
    tokenizer = service.deployment.tokenizer
    prompt_end = tokenizer.prompt_end(prompt_ids)
    with about("tools" if asked is None else asked.field):
        grammar = _grammar_of(form, use, asked, prompt_end)
        constraint = None if grammar is None else await _compile(service, grammar, use, asked)
    return EncodedChat(prompt_ids, constraint, form, use, tokenizer, prompt_end)


def _grammar_of(form: AnswerFormat, use: ToolUse, asked: Form | None, prompt_end: str) -> Grammar | None:
    """What the whole answer has to look like, reasoning and calls included; None: anything."""
    if use.is_required:
        return form.grammar(use.tools, use.name, parallel=use.is_parallel, prompt_end=prompt_end)
    if asked is not None and use.tools:
        return form.form_or_calls(asked.grammar, use.tools, parallel=use.is_parallel, prompt_end=prompt_end)
    if use.is_strict and form.marks_calls:
        return form.free_grammar(use.tools, parallel=use.is_parallel, prompt_end=prompt_end)
    return None if asked is None else form.after_reasoning(asked.grammar, prompt_end)


async def compile_form(service: Service, form: Form) -> CompiledGrammar:
    """
    Raises:
        RequestError: see `Service.compile_grammar`; about the form's field.
    """
    with about(form.field):
        return await service.compile_grammar(form.grammar)


async def _compile(service: Service, grammar: Grammar, use: ToolUse, asked: Form | None) -> CompiledGrammar:
    """Compile what has been put together. Clients know nothing of its rules: an error is about the part that is wrong.

    Raises:
        RequestError: see `Service.compile_grammar`.
    """
    try:
        return await service.compile_grammar(grammar)
    except RequestError:
        if asked is not None and grammar == asked.grammar:
            raise
        await service.encoder.turn(lambda: _check_parts(use, asked))
    parts = [*([asked.field] if asked is not None else []), *(["the schemas of tools"] if use.tools else [])]
    raise RequestError(
        f"What the answer has to look like by {' and '.join(parts)} takes more time or memory than it may.",
        remedy="Make it simpler: fewer tools, fewer optional properties, smaller repetitions.",
    )


def _check_parts(use: ToolUse, asked: Form | None) -> None:
    """
    Raises:
        RequestError: the form, or the schema of a tool, cannot be followed by itself.
    """
    if asked is not None:
        check_grammar(asked.grammar)
    for tool in use.tools:
        place = use.schema_places[name_of(tool)]
        with about(place):
            try:
                check_grammar(Grammar.of_schema(schema_of(tool)))
            except RequestError as error:
                raise RequestError(f"{place}, of {name_of(tool)}: {error.what}", remedy=error.remedy) from None


def _mark_ids(tokenizer: Tokenizer, mark: str) -> tuple[int, ...]:
    """The tokens of a mark, without the space that some tokenizers begin every text with."""
    pieces = tokenizer.encode_by_piece(mark, len(mark) + 1, add_special_tokens=False)
    token_ids = [token_id for piece in pieces for token_id in piece]
    while token_ids and not tokenizer.token_text(token_ids[0]).strip():
        del token_ids[0]
    return tuple(token_ids)


class AnswerReader:
    """The outputs of one answer → its deltas.

    Args:
        is_parallel: otherwise the answer ends with its first call.

    Attributes:
        num_reasoning_tokens: tokens so far that gave reasoning, or ended it.
        is_beyond: what comes now is no part of the answer any more.
    """

    def __init__(self, parser: AnswerParser, tokenizer: Tokenizer, *, is_parallel: bool) -> None:
        self._parser = parser
        self._tokenizer = tokenizer
        self._is_parallel = is_parallel
        self._num_pending = 0  # tokens that have not shown yet what they belong to
        self.num_reasoning_tokens = 0
        self._arguments: dict[int, list[str]] = {}  # of each call so far, in pieces
        self.is_beyond = False

    def read(self, output: RequestOutput, *, keeps_stop: bool = False) -> list[AnswerDelta]:
        """What one more output adds.

        Args:
            keeps_stop: a stop string or token that ended the answer is part of it.
        """
        text = output.text
        if keeps_stop and output.stopped_by is not None:
            stop = output.stopped_by
            text += stop if isinstance(stop, str) else self._tokenizer.token_text(stop)
        deltas = self._parser.push(text) if text else []
        if output.is_finished:
            deltas = [*deltas, *self._parser.finish()]
        if not self._is_parallel:
            deltas = self._up_to_second_call(deltas)
        self._count(output.num_tokens, deltas)
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                self._arguments.setdefault(delta.index, []).append(delta.arguments)
        return deltas

    @property
    def has_called(self) -> bool:
        """Whether the answer has called a tool, and each of its calls is complete. To be asked at its end."""
        calls = ["".join(pieces) for pieces in self._arguments.values()]
        return bool(calls) and all(arguments_of(call) is not None for call in calls)

    def _up_to_second_call(self, deltas: list[AnswerDelta]) -> list[AnswerDelta]:
        kept: list[AnswerDelta] = []
        for delta in deltas:
            self.is_beyond = self.is_beyond or (isinstance(delta, ToolCallDelta) and delta.index > 0)
            if not self.is_beyond:
                kept.append(delta)
        return kept

    def _count(self, num_tokens: int, deltas: Sequence[AnswerDelta]) -> None:
        self._num_pending += num_tokens
        if deltas:
            if isinstance(deltas[0], ReasoningDelta):
                self.num_reasoning_tokens += self._num_pending
            self._num_pending = 0
