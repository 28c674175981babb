"""Items of `/v1/responses`: those of an input, and those of an output as they grow.

In: a request's JSON; `AnswerDelta`s. Out: messages for `ChatPrompt`; items, and the events that tell of them. Must
never know: sampling, HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from orjson import Fragment
from pydantic import Discriminator, Field, Tag

from amalgam.errors import RequestError, UnsupportedError, describe
from amalgam.server.api.common import MAX_PARTS
from amalgam.server.api.openai.messages import ContentPart
from amalgam.server.api.openai.refusing import OpenAIBody
from amalgam.server.api.refusing import Refused
from amalgam.text.answers.contract import AnswerDelta, ContentDelta, ReasoningDelta, ToolCallDelta
from amalgam.text.answers.parts import arguments_of


class InputPart(ContentPart):
    inside = "input"


Content = str | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
Event = dict[str, Any]


class _Item(OpenAIBody):
    refused = {  # noqa: RUF012
        "phase": Refused("It says nothing to the model."),
        "caller": Refused("Tools are called by the model itself.", ({"type": "direct"},)),
        "namespace": Refused("Tools have no namespaces."),
        "async": Refused("A call ends the answer.", (False,)),
        "async_": Refused("A call ends the answer.", (False,)),
    }

    id: str | None = None
    status: ItemStatus | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class FunctionCallItem(_Item):
    type: Literal["function_call"]
    call_id: str = Field(min_length=1, max_length=256)
    name: str = Field(min_length=1, max_length=256)
    arguments: str


class FunctionCallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1, max_length=256)
    output: Content


class ReasoningText(OpenAIBody):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(_Item):
    refused = {  # noqa: RUF012
        **_Item.refused,
        "encrypted_content": Refused("Reasoning is not encrypted here.", ("",)),
    }

    type: Literal["reasoning"]
    summary: list[ReasoningText] = Field(default_factory=list, max_length=MAX_PARTS, fail_fast=True)
    content: list[ReasoningText] = Field(default_factory=list, max_length=MAX_PARTS, fail_fast=True)


_KINDS = ("message", "function_call", "function_call_output", "reasoning")


def _kind(item: Any) -> str:
    kind = item.get("type", "message") if isinstance(item, dict) else "message"
    if isinstance(kind, str) and kind not in _KINDS:
        raise UnsupportedError(
            f"input has an item of type {describe(kind)}.", remedy=f"Allowed: {', '.join(_KINDS)}.", param="input"
        )
    return kind if isinstance(kind, str) else "message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def as_messages(
    instructions: str | None, items: str | Sequence[InputItem], *, knows_developer: bool
) -> list[dict[str, Any]]:
    """What a `ChatPrompt` takes. Reasoning, text and calls of the assistant that follow each other are one message.

    Raises:
        RequestError: there is nothing to be answered.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    if not items:
        raise RequestError("input is an empty list.", remedy="Give a text, or at least one item.", param="input")
    turn: dict[str, Any] | None = None  # the assistant's message that still grows
    for item in items:
        if isinstance(item, FunctionCallOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
            turn = None
            continue
        if isinstance(item, MessageItem) and item.role != "assistant":
            role = "system" if item.role == "developer" and not knows_developer else item.role
            messages.append({"role": role, "content": _text(item.content)})
            turn = None
            continue
        if turn is None or (not isinstance(item, FunctionCallItem) and "tool_calls" in turn):
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        if isinstance(item, MessageItem):
            turn["content"] += _text(item.content)
        elif isinstance(item, ReasoningItem):
            thought = "".join(part.text for part in item.content or item.summary)
            if thought:
                turn["reasoning_content"] = turn.get("reasoning_content", "") + thought
        else:
            call = {"name": item.name, "arguments": item.arguments}
            turn.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": call})
    return messages


def _text(content: Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.shown for part in content)


class OutputItems:
    """The items of one answer, as it grows.

    Attributes:
        finished: those that have ended.
        is_cut: a call among them is not complete.
    """

    def __init__(self) -> None:
        self.finished: list[dict[str, Any]] = []
        self.is_cut = False
        self._open: dict[str, Any] | None = None
        self._text: list[str] = []
        self._logprobs: list[Fragment] = []
        self._call = -1

    def add(self, deltas: Sequence[AnswerDelta], logprobs: Sequence[Fragment] = ()) -> Iterator[Event]:
        """What is told of some more of the answer.

        Args:
            logprobs: of the tokens that gave its text, as JSON.
        """
        for delta in deltas:
            yield from self._begin(delta)
            assert self._open is not None
            text = delta.arguments if isinstance(delta, ToolCallDelta) else delta.text
            if not text:
                continue
            self._text.append(text)
            if isinstance(delta, ContentDelta):
                self._logprobs += logprobs
                yield self._about("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))
                logprobs = ()
            elif isinstance(delta, ReasoningDelta):
                yield self._about("response.reasoning_text.delta", content_index=0, delta=text)
            else:
                yield self._about("response.function_call_arguments.delta", delta=text)

    def finish(self, status: ItemStatus = "completed") -> Iterator[Event]:
        """Nothing follows.

        Args:
            status: of the last item.
        """
        if self._open is None and not self.finished:
            yield from self._begin(ContentDelta(""))
        yield from self._end(status)

    def _begin(self, delta: AnswerDelta) -> Iterator[Event]:
        """An item that the delta belongs to, if none such is open."""
        kind = self._open and self._open["type"]
        if isinstance(delta, ToolCallDelta):
            if kind == "function_call" and delta.index == self._call:
                return
            yield from self._end()
            self._call = delta.index
            item = {"type": "function_call", "id": _new_id("fc"), "call_id": delta.id, "name": delta.name or ""}
            self._open = {**item, "arguments": "", "status": "in_progress"}
            yield self._added()
            return
        wanted = "message" if isinstance(delta, ContentDelta) else "reasoning"
        if kind == wanted:
            return
        yield from self._end()
        if wanted == "message":
            self._open = {"type": "message", "id": _new_id("msg"), "role": "assistant", "content": []}
        else:
            self._open = {"type": "reasoning", "id": _new_id("rs"), "summary": [], "content": []}
        self._open["status"] = "in_progress"
        yield self._added()
        yield self._about("response.content_part.added", content_index=0, part=self._part())

    def _end(self, status: ItemStatus = "completed") -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        text = "".join(self._text)
        if item["type"] == "function_call":
            item["arguments"] = text
            if arguments_of(text) is None:
                status, self.is_cut = "incomplete", True
            yield self._about("response.function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = self._part()
            item["content"] = [part]
            if item["type"] == "message":
                yield self._about("response.output_text.done", content_index=0, text=text, logprobs=part["logprobs"])
            else:
                yield self._about("response.reasoning_text.done", content_index=0, text=text)
            yield self._about("response.content_part.done", content_index=0, part=part)
        item["status"] = status
        yield {"type": "response.output_item.done", "output_index": len(self.finished), "item": item}
        self.finished.append(item)
        self._open, self._text, self._logprobs = None, [], []

    def _part(self) -> dict[str, Any]:
        assert self._open is not None
        text = "".join(self._text)
        if self._open["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    def _added(self) -> Event:
        assert self._open is not None
        return {"type": "response.output_item.added", "output_index": len(self.finished), "item": dict(self._open)}

    def _about(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        return {"type": kind, "item_id": self._open["id"], "output_index": len(self.finished), **fields}


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
