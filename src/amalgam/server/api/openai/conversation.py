"""A chat → choices of content, reasoning and tool calls: what chat completions and responses have in common.

In: messages, tools, sampling parameters. Out: `AnswerDelta`s of each choice as they come. Must never know: the shapes
of answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from amalgam.engine.request import Observation, RequestOutput, SamplingParams
from amalgam.errors import RequestError
from amalgam.server.api.common import ToolUse
from amalgam.server.choices import Choices, Wanted
from amalgam.server.interface import Tokenizer
from amalgam.server.service import Service
from amalgam.text.answers.contract import AnswerDelta, ContentDelta, ReasoningDelta, ToolCallDelta
from amalgam.text.answers.format import AnswerFormat
from amalgam.text.chat import ChatPrompt
from amalgam.text.grammar import Grammar


@dataclass(frozen=True)
class Conversation:
    """What is to be answered.

    Attributes:
        grammar: what the answer's content has to look like.
        separates_reasoning: otherwise it is content, tags included.
    """

    prompt: ChatPrompt
    use: ToolUse
    params: SamplingParams
    num_samples: int
    observation: Observation
    grammar: Grammar | None = None
    separates_reasoning: bool = True


@dataclass(frozen=True)
class Started:
    """A conversation whose choices are under way."""

    choices: Choices
    prompt_ids: list[int]
    readers: list[ChoiceReader]


async def start(service: Service, conversation: Conversation) -> Started:
    """Encode, and submit all samples.

    Raises:
        RequestError, OverloadedError: see `Service.encode` and `Choices.submit`.
    """
    use, params = conversation.use, conversation.params
    if conversation.grammar is not None and use.tools:
        raise RequestError(
            "response_format, or another form of the answer, is given with tools.",
            remedy="Give tool_choice 'none', or no form: a call would not have it.",
            param="response_format",
        )
    [prompt_ids] = await service.encode([conversation.prompt])
    deployment = service.deployment
    form = service.answer_format
    prompt_end = deployment.tokenizer.prompt_end(prompt_ids)
    grammar = conversation.grammar
    if use.is_required:
        grammar = form.grammar(use.tools, use.name, parallel=use.is_parallel, prompt_end=prompt_end)
    elif grammar is not None:
        grammar = form.after_reasoning(grammar, prompt_end)
    constraint = None if grammar is None else await service.compile_grammar(grammar)
    params = replace(params, continues_prompt=False)
    if form.keeps_special_tokens:
        params = replace(params, keeps_special_tokens=True)
    wanted = Wanted(params, conversation.num_samples, conversation.observation, constraint)
    choices = await Choices.submit(deployment.engine, [prompt_ids], wanted, service.max_batch_in_flight)
    readers = [
        ChoiceReader(form, use, prompt_end, deployment.tokenizer, separates_reasoning=conversation.separates_reasoning)
        for _ in range(conversation.num_samples)
    ]
    return Started(choices, prompt_ids, readers)


class ChoiceReader:
    """The outputs of one choice → its deltas.

    Attributes:
        num_reasoning_tokens: tokens so far that gave reasoning, or ended it.
        has_called: a tool.
    """

    def __init__(
        self, form: AnswerFormat, use: ToolUse, prompt_end: str, tokenizer: Tokenizer, *, separates_reasoning: bool
    ) -> None:
        self._parser = form.parser(use.tools, reasoning=separates_reasoning, prompt_end=prompt_end)
        self._use = use
        self._tokenizer = tokenizer
        self._num_pending = 0  # tokens that have not shown yet what they belong to
        self.num_reasoning_tokens = 0
        self.has_called = False

    def read(self, output: RequestOutput, *, keeps_stop: bool = False) -> list[AnswerDelta]:
        """What one more output adds.

        Args:
            keeps_stop: a stop string or token that ended the choice is part of it.
        """
        text = output.text
        if keeps_stop and output.stopped_by is not None:
            stop = output.stopped_by
            text += stop if isinstance(stop, str) else self._tokenizer.token_text(stop)
        deltas = self._parser.push(text) if text else []
        if output.is_finished:
            deltas = [*deltas, *self._parser.finish()]
        if not self._use.is_parallel:
            deltas = [delta for delta in deltas if not isinstance(delta, ToolCallDelta) or delta.index == 0]
        self._count(len(output.token_ids), deltas)
        self.has_called = self.has_called or any(isinstance(delta, ToolCallDelta) for delta in deltas)
        return deltas

    def _count(self, num_tokens: int, deltas: Sequence[AnswerDelta]) -> None:
        self._num_pending += num_tokens
        if deltas:
            if isinstance(deltas[0], ReasoningDelta):
                self.num_reasoning_tokens += self._num_pending
            self._num_pending = 0


@dataclass
class Parts:
    """The deltas of one choice, put together; None: there were none of the kind."""

    content: str | None = None
    reasoning: str | None = None
    calls: dict[int, dict[str, str]] = field(default_factory=dict)  # index → id, name, arguments

    def add(self, deltas: Sequence[AnswerDelta]) -> None:
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                self.content = (self.content or "") + delta.text
            elif isinstance(delta, ReasoningDelta):
                self.reasoning = (self.reasoning or "") + delta.text
            else:
                call = self.calls.setdefault(delta.index, {"id": delta.id, "name": "", "arguments": ""})
                call["name"] += delta.name or ""
                call["arguments"] += delta.arguments


def chat_token_limit(service: Service, *limits: int | None) -> int:
    """Most new tokens: what the request says, or the model, or as many as fit."""
    given = [limit for limit in limits if limit is not None]
    default: int = service.deployment.defaults.from_model.get("max_new_tokens", 2**31 - 1)
    return given[0] if given else default
