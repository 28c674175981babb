"""Conversations in this process: messages → token ids, and an answer's text → the assistant's message.

In: messages as OpenAI's interface has them. Out: what the engine takes; content, reasoning and tool calls. Must never
know: HTTP, terminals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Generation
from amalgam.runtime.deployment import Deployment
from amalgam.text.answers.contract import AnswerDelta, AnswerParser
from amalgam.text.answers.parts import AnswerParts
from amalgam.text.answers.registry import answer_format
from amalgam.text.grammar import Grammar

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]
_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ChatAnswer:
    """An answer to a conversation.

    Attributes:
        message: `role`, `content`, and where there are any `reasoning_content` and `tool_calls`: the conversation goes
            on behind it.
    """

    message: dict[str, Any]
    generation: Generation


class Chats:
    """How the model of one deployment talks.

    Raises:
        ConfigError: `server.tool_parser` or `server.reasoning_parser` names no parser.
    """

    def __init__(self, deployment: Deployment) -> None:
        self._tokenizer, server = deployment.tokenizer, deployment.settings.server
        self._max_tokens = deployment.engine.max_prompt_tokens
        self._form = answer_format(
            self._tokenizer.chat_template, self._tokenizer.special_tokens, server.tool_parser, server.reasoning_parser
        )

    def encode(self, messages: Messages, tools: Tools | None = None, variables: Mapping[str, Any] = _NONE) -> list[int]:
        """
        Args:
            tools: functions that the model may call, as OpenAI's interface has them.
            variables: what else the chat template may refer to, such as `enable_thinking`.

        Raises:
            RequestError: there is no chat template, it refuses the messages, or they are malformed.
            PromptTooLongError: they leave no room for a new token.
        """
        return self._tokenizer.encode_chat(messages, self._max_tokens, tools=tools or None, variables=variables)

    def params(self, params: SamplingParams) -> SamplingParams:
        """The same for an answer that is to be taken apart."""
        keeps = self._form.keeps_special_tokens or params.keeps_special_tokens
        return replace(params, continues_prompt=False, keeps_special_tokens=keeps)

    def grammar(self, grammar: Grammar, prompt_ids: Sequence[int]) -> Grammar:
        """What an answer must follow whose content has to follow `grammar`: reasoning may come before it."""
        return self._form.after_reasoning(grammar, self._tokenizer.prompt_end(prompt_ids))

    def parser(self, prompt_ids: Sequence[int], tools: Tools | None = None) -> AnswerParser:
        """Takes one answer apart as it comes."""
        return self._form.parser(tools, prompt_end=self._tokenizer.prompt_end(prompt_ids))

    def answer(self, prompt_ids: Sequence[int], tools: Tools | None, generation: Generation) -> ChatAnswer:
        """A whole answer, taken apart."""
        parser = self.parser(prompt_ids, tools)
        return ChatAnswer(message_of([*parser.push(generation.text), *parser.finish()]), generation)


def message_of(deltas: Iterable[AnswerDelta]) -> dict[str, Any]:
    """The assistant's message that the parts of an answer are. A call that is not complete is content."""
    parts = AnswerParts()
    parts.add(deltas)
    parts.finish()
    message: dict[str, Any] = {"role": "assistant", "content": parts.content or ""}
    if parts.reasoning is not None:
        message["reasoning_content"] = parts.reasoning
    if parts.calls:
        message["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(parts.calls.items())
        ]
    return message
