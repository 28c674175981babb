"""A chat → choices of content, reasoning and tool calls: what chat completions and responses have in common.

In: messages, tools, sampling parameters. Out: `AnswerDelta`s of each choice as they come. Must never know: the shapes
of answers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Observation
from amalgam.server.api.chats import AnswerReader, encode_chat
from amalgam.server.api.common import Form, ToolUse
from amalgam.server.choices import Choices, Wanted
from amalgam.server.service import Service
from amalgam.text.chat import ChatPrompt


@dataclass(frozen=True)
class Conversation:
    """What is to be answered.

    Attributes:
        field: of the request, that has the prompt.
        form: what the answer's content has to look like.
        separates_reasoning: otherwise it is content, tags included.
        max_thinking: most tokens of reasoning, and the field that says so.
    """

    prompt: ChatPrompt
    field: str
    use: ToolUse
    params: SamplingParams
    num_samples: int
    observation: Observation
    form: Form | None = None
    separates_reasoning: bool = True
    max_thinking: tuple[int | None, str] = (None, "")


@dataclass(frozen=True)
class Started:
    """A conversation whose choices are under way."""

    choices: Choices
    prompt_ids: list[int]
    readers: list[AnswerReader]


async def start(service: Service, conversation: Conversation) -> Started:
    """Encode, and submit all samples.

    Raises:
        RequestError, OverloadedError: see `Service.encode` and `Choices.submit`.
    """
    chat = await encode_chat(service, conversation.prompt, conversation.use, conversation.form, conversation.field)
    keeps = chat.form.keeps_special_tokens or conversation.params.keeps_special_tokens
    limit = chat.thinking_limit(*conversation.max_thinking)
    params = replace(conversation.params, continues_prompt=False, keeps_special_tokens=keeps, thinking=limit)
    wanted = Wanted(
        params, conversation.num_samples, conversation.observation, chat.constraint, prompt_field=conversation.field
    )
    choices = await Choices.submit(service.deployment.engine, [chat.prompt_ids], wanted, service.max_batch_in_flight)
    readers = [
        chat.reader(separates_reasoning=conversation.separates_reasoning) for _ in range(conversation.num_samples)
    ]
    return Started(choices, chat.prompt_ids, readers)


def chat_token_limit(service: Service, *limits: int | None) -> int:
    """Most new tokens: what the request says, or the model, or as many as fit."""
    given = [limit for limit in limits if limit is not None]
    default: int = service.deployment.defaults.from_model.get("max_new_tokens", 2**31 - 1)
    return given[0] if given else default
