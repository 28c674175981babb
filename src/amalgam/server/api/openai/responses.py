"""`POST /v1/responses`: the same as a chat completion, in items. Nothing is stored: a request holds all of its context.

In: a text or items, tools. Out: a response object, or its events.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Self

import orjson
from fastapi import APIRouter
from orjson import Fragment
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.params import MAX_LOGPROBS, SamplingParams
from amalgam.engine.request import FinishReason, RequestOutput, Usage
from amalgam.errors import UnsupportedError, describe
from amalgam.server.api.common import MAX_INT, MAX_MESSAGES, Form
from amalgam.server.api.openai.answers import error_fields, fingerprint
from amalgam.server.api.openai.chat import Effort, Metadata
from amalgam.server.api.openai.conversation import (
    Conversation,
    Started,
    chat_token_limit,
    start,
)
from amalgam.server.api.openai.documents import OpenAIErrorAnswer, ResponseAnswer
from amalgam.server.api.openai.fields import JSONSchema, SamplerFields
from amalgam.server.api.openai.items import Event, InputItem, OutputItems, as_messages
from amalgam.server.api.openai.refusing import OpenAIBody
from amalgam.server.api.openai.tokens import TokenNames, chat_logprobs
from amalgam.server.api.openai.tools import MAX_TOOLS, FunctionFields, ToolChoice, tool_use
from amalgam.server.api.refusing import Refused
from amalgam.server.api.variables import takes_effort, template_variables
from amalgam.server.dependencies import Admission, RequestId, ServiceArgument
from amalgam.server.events import EventStream, event
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.interface import Tokenizer
from amalgam.text.answers.contract import ContentDelta
from amalgam.text.chat import ChatPrompt
from amalgam.text.grammar import Grammar

STATELESS = "Nothing is stored here: send the whole conversation as input."
INCLUDED_LOGPROBS = "message.output_text.logprobs"

router = APIRouter(route_class=StrictRoute, tags=["openai"], responses=OpenAIErrorAnswer.RESPONSES)


class TextFormat(OpenAIBody):
    place = "text.format."

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_-]+$")
    schema_: JSONSchema = Field(default=None, alias="schema")
    strict: bool | None = None
    """The answer follows the schema either way."""
    description: str | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("schema is needed with type 'json_schema', and only there")
        return self

    def form(self) -> Form | None:
        if self.type == "json_schema":
            return Form.of_schema(self.schema_, "text.format")
        return Form(Grammar("json_object"), "text.format") if self.type == "json_object" else None


class TextOptions(OpenAIBody):
    place = "text."

    format: TextFormat | None = None


class ReasoningOptions(OpenAIBody):
    place = "reasoning."
    refused = {  # noqa: RUF012
        "summary": Refused("Reasoning is shown as it is, not summarized.", ("auto",)),
        "generate_summary": Refused("Reasoning is shown as it is, not summarized.", ("auto",)),
    }

    effort: Effort | None = None


class ResponseStreamOptions(OpenAIBody):
    place = "stream_options."
    refused = {  # noqa: RUF012
        "include_obfuscation": Refused("Events are not padded.", (False,))
    }


class ResponseTool(FunctionFields):
    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_function(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "function":
            raise UnsupportedError(
                f"tools has one of type {describe(kind)}.", remedy="Allowed: function.", param="tools"
            )
        return data


class ResponseBody(SamplerFields):
    refused = {  # noqa: RUF012
        "previous_response_id": Refused(STATELESS),
        "conversation": Refused(STATELESS),
        "background": Refused("Answers are given while the client waits.", (False,)),
        "prompt": Refused("There are no stored prompts."),
        "max_tool_calls": Refused("The server calls no tools by itself."),
        "truncation": Refused("A prompt that is too long is refused, never cut.", ("disabled",)),
        "context_management": Refused(STATELESS),
        "image": Refused("The model writes text only."),
    }

    input: str | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES, fail_fast=True)]
    """A text, or messages, calls of functions, their outputs, and reasoning, oldest first."""
    instructions: str | None = None
    """A system message before all others."""
    client_metadata: dict[str, str] | None = None
    """Codex's marks of itself; accepted, nothing is made of them."""
    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    """Most tokens, reasoning included. null: what the model's makers say, or as many as fit."""
    text: TextOptions | None = None
    """`{"format": {"type": "text" | "json_object" | "json_schema"}}`."""
    tools: list[ResponseTool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    """Functions that the model may call."""
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True
    """False: at most one call."""
    reasoning: ReasoningOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(
        default_factory=list, fail_fast=True
    )
    """Log-probabilities. Reasoning is always included, in the clear, and can be sent back as it is."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """So many likeliest tokens at each place."""
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    """Accepted, and answered false: nothing is stored."""
    metadata: Metadata | None = None
    """Answered as it is."""
    prompt_cache_key: str | None = None
    """Prompts with the same beginning share it without a key. While weights are tried, equal keys get the same ones."""
    safety_identifier: str | None = None
    """Nothing is made of it but this: while a candidate for the weights is tried, equal ones get the same weights."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as `enable_thinking`."""

    @property
    def num_top(self) -> int | None:
        wanted = INCLUDED_LOGPROBS in self.include or self.top_logprobs
        return (self.top_logprobs or 0) if wanted else None


@router.post("/v1/responses", dependencies=[Admission], response_model=ResponseAnswer)
async def create_response(
    body: ResponseBody, request: Request, service: ServiceArgument, request_id: RequestId
) -> Response:
    """Answer a text or a conversation."""
    model = body.check_model(service)
    use = tool_use(body.tools, body.tool_choice, "tools[{}].parameters", is_parallel=body.parallel_tool_calls)
    tokenizer = service.deployment.tokenizer
    template = tokenizer.chat_template
    params = body.sampling_params(
        service,
        max_new_tokens=chat_token_limit(service, body.max_output_tokens),
        logprobs=body.num_top,
    )
    effort = None if body.reasoning is None else body.reasoning.effort
    prompt = ChatPrompt(
        as_messages(body.instructions, body.input, knows_developer="developer" in (template or "")),
        use.tools or None,
        variables=template_variables(template, body.chat_template_kwargs, effort=effort),
    )
    text_format = None if body.text is None else body.text.format
    form = None if text_format is None else text_format.form()
    conversation = Conversation(prompt, "input", use, params, 1, body.observation(), form)
    version_id = service.choose_weights(body.weights, body.prompt_cache_key or body.safety_identifier or body.user)

    async def answer() -> Response:
        started = await start(service, conversation)
        answering = _Answering(body, model, version_id, params, tokenizer, started)
        if body.stream:
            return EventStream(
                started.choices,
                answering.events(),
                lambda error: answering.failed(error, request_id),
                request_id,
                service.settings.server.stream_comment_seconds,
                end=b"",  # the last event says that it is the last
            )
        return await answering.whole()

    return await unless_client_leaves(request.receive, answer())


@dataclass
class _Answering:
    """One request's answer → what its client gets."""

    body: ResponseBody
    model: str
    version: int
    params: SamplingParams
    tokenizer: Tokenizer
    started: Started
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(16)}")
    created_at: int = field(default_factory=lambda: int(time.time()))
    items: OutputItems = field(default_factory=OutputItems)
    usage: Usage | None = None
    reason: FinishReason | None = None
    num_events: int = 0
    _pending: list[Fragment] = field(default_factory=list)  # log-probabilities of tokens that have no text yet

    async def whole(self) -> Response:
        names = TokenNames(self.tokenizer)
        try:
            async for _, output in self.started.choices:
                for _event in self._take(output, names):
                    pass
        finally:
            await self.started.choices.aclose()
        return OrjsonResponse(self._object(self._status))

    async def events(self) -> AsyncGenerator[bytes]:
        names = TokenNames(self.tokenizer)
        for kind in ("response.created", "response.in_progress"):
            yield self._encode({"type": kind, "response": self._object("in_progress")})
        async for _, output in self.started.choices:
            for fields in self._take(output, names):
                yield self._encode(fields)
        yield self._encode({"type": f"response.{self._status}", "response": self._object(self._status)})

    def failed(self, error: Exception, request_id: str) -> bytes:
        told = error_fields(error, request_id)["error"]
        code = "server_error" if told["type"] == "server_error" else "invalid_prompt"
        response = {**self._object("failed"), "error": {"code": code, "message": told["message"]}}
        return self._encode({"type": "response.failed", "response": response})

    def _take(self, output: RequestOutput, names: TokenNames) -> Iterator[Event]:
        deltas = self.started.readers[0].read(output)
        logprobs: Sequence[Fragment] = ()
        if self.body.num_top is not None:
            entries = chat_logprobs(names, output.token_ids, output.logprobs, self.body.num_top)
            # Four of the last events have those of the whole answer: each is written out when its token comes.
            self._pending += [Fragment(orjson.dumps(entry)) for entry in entries]
            if deltas:
                logprobs, self._pending = self._pending, []
                logprobs = logprobs if any(isinstance(delta, ContentDelta) for delta in deltas) else ()
        yield from self.items.add(deltas, logprobs)
        if output.is_finished:
            self.usage, self.reason = output.usage, output.finish_reason
            yield from self.items.finish(self._status)

    @property
    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._why_incomplete is not None or self.items.is_cut else "completed"

    @property
    def _why_incomplete(self) -> str | None:
        if self.reason is FinishReason.LENGTH:
            return "max_output_tokens"
        return "content_filter" if self.reason is FinishReason.CONTENT_FILTER else None

    def _encode(self, fields: Event) -> bytes:
        encoded = event({**fields, "sequence_number": self.num_events}, fields["type"])
        self.num_events += 1
        return encoded

    def _object(self, status: str) -> dict[str, Any]:
        body, params = self.body, self.params
        text_format = None if body.text is None else body.text.format
        shown_format: dict[str, Any] = {"type": "text"}
        if text_format is not None:
            shown_format = text_format.model_dump(by_alias=True, exclude_none=True)
        said = body.reasoning
        effort = said.effort if said is not None and takes_effort(self.tokenizer.chat_template) else None
        tools = [{"strict": None, "description": None, "parameters": None, **_dump(tool)} for tool in body.tools]
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": self._why_incomplete} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": self.items.finished,
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": effort, "summary": None},
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": False,
            "system_fingerprint": fingerprint(self.usage.version if self.usage else self.version),
            "temperature": params.temperature,
            "text": {"format": shown_format},
            "tool_choice": body.tool_choice or "auto",
            "tools": tools,
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage(),
            "user": body.user,
        }

    def _usage(self) -> dict[str, Any] | None:
        usage = self.usage
        if usage is None:
            return None
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.num_new_tokens,
            "output_tokens_details": {"reasoning_tokens": self.started.readers[0].num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_new_tokens,
        }


def _dump(tool: ResponseTool) -> dict[str, Any]:
    return tool.model_dump(exclude_none=True)
