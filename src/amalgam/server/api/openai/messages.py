"""Messages of a chat: checked, and brought into the form that chat templates are written for.

In: a request's JSON. Out: dictionaries for `ChatPrompt`. Must never know: templates, sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from amalgam.errors import RequestError, UnsupportedError, describe
from amalgam.server.api.common import MAX_CALLS, MAX_PARTS
from amalgam.server.api.openai.refusing import CACHE_CONTROL, OpenAIBody
from amalgam.server.api.refusing import Refused
from amalgam.server.http.body import Body

TEXT_ONLY = "The model takes text only."
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type → its text


class ContentPart(OpenAIBody):
    inside: ClassVar[str] = "messages"  # the request's field
    refused = CACHE_CONTROL | {
        "annotations": Refused("They say nothing to the model.", ([],)),
        "logprobs": Refused("They say nothing to the model.", ([],)),
        "prompt_cache_breakpoint": Refused("Prompts are cached without being asked."),
    }

    type: Literal["text", "refusal"]
    text: str | None = None
    refusal: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        if isinstance(data, dict):
            kind = data.get("type")
            if isinstance(kind, str) and kind not in _TEXT_PARTS:
                raise UnsupportedError(
                    f"A message has content of type {describe(kind)}.", remedy=TEXT_ONLY, param=cls.inside
                )
            if isinstance(kind, str) and not isinstance(data.get(_TEXT_PARTS[kind]), str):
                raise ValueError(f"a part of type {kind!r} needs {_TEXT_PARTS[kind]!r}, a string")
            if kind in ("input_text", "output_text"):
                return {**data, "type": "text"}
        return data

    @property
    def shown(self) -> str:
        return (self.text if self.type == "text" else self.refusal) or ""


ContentParts = Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class CalledFunction(Body):
    name: str = Field(min_length=1, max_length=256)
    arguments: str
    """JSON."""


class ToolCall(Body):
    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """As in the chunks of a stream; not needed."""


class Message(OpenAIBody):
    refused = CACHE_CONTROL | {
        "audio": Refused(TEXT_ONLY),
        "function_call": Refused("Functions are called through tool_calls."),
        "annotations": Refused("They say nothing to the model.", ([],)),
        "provider_specific_fields": Refused("They say nothing to the model.", ({},)),
        # lm_eval puts "text" on messages, /v1/responses has "message".
        "type": Refused("Messages are of one type; parts of their content have types.", ("text", "message")),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | ContentParts | None = None
    """A text, or parts of type text."""
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_CALLS, fail_fast=True)
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    """What the assistant thought before; the template says whether the model sees it."""
    reasoning_content: str | None = None
    """The same under its older name."""

    @model_validator(mode="before")
    @classmethod
    def _no_functions(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "function":
            raise UnsupportedError(
                "A message has the role 'function'.", remedy="Use the role 'tool' with tool_call_id.", param="messages"
            )
        return data


def for_template(messages: Sequence[Message], *, knows_developer: bool) -> list[dict[str, Any]]:
    """What a `ChatPrompt` takes.

    Args:
        knows_developer: whether the template has that role; to others such a message is one of the system.

    Raises:
        RequestError: a message lacks what its role needs, or has what it cannot have.
    """
    return [_normalized(message, f"messages[{index}]", knows_developer) for index, message in enumerate(messages)]


def _normalized(message: Message, where: str, knows_developer: bool) -> dict[str, Any]:
    role, content = message.role, _text_of(message)
    if role != "assistant":
        for name in ("tool_calls", "refusal", "reasoning", "reasoning_content"):
            if getattr(message, name) is not None:
                raise RequestError(
                    f"{where} has {name} and the role {role!r}.", remedy="Only an assistant's has it.", param=where
                )
        if content is None:
            raise RequestError(f"{where} has no content.", remedy="Give one.", param=f"{where}.content")
    elif content is None and not message.tool_calls:
        raise RequestError(
            f"{where} has neither content nor tool_calls.", remedy="Give one of them.", param=f"{where}.content"
        )
    if (role == "tool") != (message.tool_call_id is not None):
        raise RequestError(
            f"{where} has the role {role!r} and {'no' if role == 'tool' else 'a'} tool_call_id.",
            remedy="A message of the role 'tool' has it, and no other.",
            param=f"{where}.tool_call_id",
        )
    normalized: dict[str, Any] = {
        "role": "system" if role == "developer" and not knows_developer else role,
        "content": content or "",
    }
    if message.name is not None:
        normalized["name"] = message.name
    if message.tool_call_id is not None:
        normalized["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        normalized["tool_calls"] = [
            {"id": call.id, "type": "function", "function": call.function.model_dump()} for call in message.tool_calls
        ]
    if reasoning := message.reasoning_content or message.reasoning:
        normalized["reasoning_content"] = reasoning
    return normalized


def _text_of(message: Message) -> str | None:
    content = message.content if message.content is not None else message.refusal
    if isinstance(content, list):
        return "\n".join(part.shown for part in content)
    return content


def check_continued(messages: Sequence[Mapping[str, Any]], *, adds_prompt: bool) -> None:
    """
    Raises:
        RequestError: the final message cannot be continued.
    """
    if adds_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt are both true.",
            remedy="Set add_generation_prompt to false.",
            param="continue_final_message",
        )
    if not messages or messages[-1]["role"] != "assistant":
        raise RequestError(
            "continue_final_message is true and the last message is not the assistant's.",
            remedy="End with the message that is to be continued.",
            param="continue_final_message",
        )
