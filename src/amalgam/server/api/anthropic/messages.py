"""`POST /v1/messages` and `/v1/messages/count_tokens`.

In: a conversation. Out: a message, at once or as events; a number of tokens.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import fastapi
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.request import FinishReason, Observation, RequestOutput
from amalgam.errors import UnsupportedError
from amalgam.server.api.anthropic.blocks import JSON, Blocks
from amalgam.server.api.anthropic.conversation import chat_prompt, sampling_params, tool_use
from amalgam.server.api.anthropic.fields import BetaQuery, MessagesBody, PromptBody, ThinkingDisabled, ThinkingEnabled
from amalgam.server.api.chats import AnswerReader, encode_chat
from amalgam.server.api.common import Form, neutral_defaults
from amalgam.server.dependencies import Admission, RequestId, ServiceArgument
from amalgam.server.events import EventStream, event
from amalgam.server.generation import checked
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse, error_content
from amalgam.server.http.shapes import anthropic
from amalgam.server.interface import OutputStream
from amalgam.server.service import Service

MAX_COUNTED_TOKENS = 2**31 - 1
PING = event({"type": "ping"}, "ping")

router = APIRouter(route_class=StrictRoute, tags=["anthropic"])

Query = Annotated[BetaQuery, fastapi.Query()]


class ErrorBody(BaseModel):
    type: str
    message: str


class ErrorAnswer(BaseModel):
    """The body of every answer with a status of 400 or more."""

    type: str = "error"
    error: ErrorBody
    request_id: str | None = None


class UsageAnswer(BaseModel):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int]


class MessageAnswer(BaseModel):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: UsageAnswer
    weight_version: int
    """The weight version that answers."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class CountAnswer(BaseModel):
    input_tokens: int


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request cannot be served as it is"},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot serve it now; 529 where it has too much to do"},
}


@router.post("/v1/messages", dependencies=[Admission], response_model=MessageAnswer, responses=RESPONSES)
async def create_message(
    body: MessagesBody, query: Query, request: Request, service: ServiceArgument, request_id: RequestId
) -> Response:
    """Answer a conversation."""

    def describe_error(error: Exception) -> bytes:
        return event(error_content(error, request_id, anthropic), "error")

    async def answer() -> Response:
        started = await _start(service, body)
        if not body.stream:
            return OrjsonResponse(await started.whole())
        comment_seconds = service.settings.server.stream_comment_seconds
        return EventStream(
            started.outputs, started.encoded(), describe_error, request_id, comment_seconds, comment=PING, end=b""
        )

    return await unless_client_leaves(request.receive, answer())


@router.post("/v1/messages/count_tokens", dependencies=[Admission], response_model=CountAnswer, responses=RESPONSES)
async def count_tokens(body: PromptBody, query: Query, request: Request, service: ServiceArgument) -> CountAnswer:
    """How many tokens the prompt of a message has."""
    service.check_model(body.model)
    prompt = chat_prompt(body, service.deployment.tokenizer.chat_template)
    [prompt_ids] = await unless_client_leaves(
        request.receive, service.encode([prompt], "messages", MAX_COUNTED_TOKENS, is_answered=False)
    )
    return CountAnswer(input_tokens=len(prompt_ids))


async def _start(service: Service, body: MessagesBody) -> _Answer:
    """Encode, and submit.

    Raises:
        AmalgamError: the request cannot be served.
    """
    name = service.check_model(body.model)
    version = service.choose_weights(body.weights, body.metadata.user_id)
    use, json_format = tool_use(body), body.output_config.format
    if use.is_strict and not service.answer_format.marks_calls:
        raise UnsupportedError(
            "tools has a tool with strict true, and this model's calls have no mark to know them by.",
            remedy="Demand a call with tool_choice (any, tool): its arguments always fit the schema.",
            param="tools",
        )
    asked = None if json_format is None else Form.of_schema(json_format.schema_, "output_config.format")
    prompt = chat_prompt(body, service.deployment.tokenizer.chat_template)
    keeps_special_tokens = service.answer_format.keeps_special_tokens
    params = sampling_params(body, neutral_defaults(service), keeps_special_tokens=keeps_special_tokens)
    chat = await encode_chat(service, prompt, use, asked, "messages")
    budget = body.thinking.budget_tokens if isinstance(body.thinking, ThinkingEnabled) else None
    params = replace(params, thinking=chat.thinking_limit(budget, "thinking.budget_tokens"))
    outputs = service.deployment.engine.stream(chat.prompt_ids, params, Observation(), chat.constraint)
    shows = isinstance(body.thinking, ThinkingDisabled) or body.thinking.display != "omitted"
    blocks = Blocks(shows_reasoning=shows)
    stop_sequences = frozenset(body.stop_sequences)
    return _Answer(name, version, len(chat.prompt_ids), outputs, chat.reader(), blocks, stop_sequences)


@dataclass
class _Answer:
    """One answer as it comes."""

    model: str
    version: int  # that was chosen; at the end, that answered
    num_prompt_tokens: int
    outputs: OutputStream
    reader: AnswerReader
    blocks: Blocks
    stop_sequences: frozenset[str]
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    stop_reason: str | None = None
    stop_sequence: str | None = None
    num_new_tokens: int = 0
    num_cached_tokens: int = 0

    async def whole(self) -> JSON:
        async for _ in self.events():
            pass
        return self._message()

    async def events(self) -> AsyncGenerator[JSON]:
        yield {"type": "message_start", "message": {**self._message(), "content": []}}
        yield {"type": "ping"}
        async with aclosing(self.outputs):
            async for output in self.outputs:
                for fields in self._read(checked(output)):
                    yield fields
                if self.stop_reason is not None:
                    break
        ended = {"stop_reason": self.stop_reason, "stop_sequence": self.stop_sequence}
        yield {
            "type": "message_delta",
            "delta": ended,
            "usage": self._usage(),
            "weight_version": self.version,
        }
        yield {"type": "message_stop"}

    async def encoded(self) -> AsyncGenerator[bytes]:
        async for fields in self.events():
            yield event(fields, fields["type"])

    def _read(self, output: RequestOutput) -> Iterator[JSON]:
        self.num_new_tokens += output.num_tokens
        if output.usage is not None:
            self.num_cached_tokens = output.usage.num_cached_tokens
            self.version = output.usage.version or self.version  # 0: it never ran
        for delta in self.reader.read(output):
            yield from self.blocks.add(delta)
        if self.reader.is_beyond or output.is_finished:
            yield from self.blocks.close()
        if self.reader.is_beyond:
            self.stop_reason = "tool_use"
        elif output.is_finished:
            self._finish(output)

    def _finish(self, output: RequestOutput) -> None:
        if output.finish_reason is FinishReason.LENGTH:
            self.stop_reason = "max_tokens"
        elif output.finish_reason is FinishReason.CONTENT_FILTER:
            self.stop_reason = "refusal"
        elif output.stopped_by in self.stop_sequences:
            self.stop_reason, self.stop_sequence = "stop_sequence", str(output.stopped_by)
        else:
            self.stop_reason = "tool_use" if self.blocks.has_called else "end_turn"

    def _message(self) -> JSON:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self.blocks.content,
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self._usage(),
            "weight_version": self.version,
        }

    def _usage(self) -> JSON:
        """What was in the cache is no input, as Anthropic counts."""
        return {
            "input_tokens": self.num_prompt_tokens - self.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.num_cached_tokens,
            "output_tokens": self.num_new_tokens,
            "output_tokens_details": {"thinking_tokens": self.reader.num_reasoning_tokens},
        }
