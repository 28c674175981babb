"""`POST /v1/chat/completions`: the next message of a chat.

In: messages, tools. Out: a chat completion, or its chunks as events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.params import MAX_LOGPROBS
from amalgam.engine.request import FinishReason, RequestOutput
from amalgam.errors import RequestError
from amalgam.server.api.chats import AnswerReader
from amalgam.server.api.common import MAX_INT, MAX_MESSAGES, MAX_PARTS, ToolUse
from amalgam.server.api.openai.answers import Head, TokenCounts, reason_of, stream_of, versions_of
from amalgam.server.api.openai.conversation import (
    Conversation,
    Started,
    chat_token_limit,
    start,
)
from amalgam.server.api.openai.documents import ChatAnswer, OpenAIErrorAnswer
from amalgam.server.api.openai.fields import SamplingFields, check_together
from amalgam.server.api.openai.messages import TEXT_ONLY, Message, check_continued, for_template
from amalgam.server.api.openai.refusing import STORE, OpenAIBody
from amalgam.server.api.openai.tokens import TokenNames, chat_logprobs, prompt_logprobs, routed_experts
from amalgam.server.api.openai.tools import MAX_TOOLS, SCHEMA_PLACE, FunctionTool, ToolChoice, tool_use
from amalgam.server.api.refusing import Refused
from amalgam.server.api.variables import template_variables
from amalgam.server.choices import Choices, Collected
from amalgam.server.dependencies import Admission, RequestId, ServiceArgument
from amalgam.server.events import event
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute, limited
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.interface import Tokenizer
from amalgam.server.service import Service
from amalgam.text.answers.contract import AnswerDelta, ContentDelta, ReasoningDelta
from amalgam.text.answers.parts import AnswerParts
from amalgam.text.chat import ChatPrompt

MAX_METADATA = 16  # as OpenAI has it

router = APIRouter(route_class=StrictRoute, tags=["openai"], responses=OpenAIErrorAnswer.RESPONSES)

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
    limited(MAX_METADATA),
]


class Thinking(OpenAIBody):
    place = "thinking."
    refused = {  # noqa: RUF012
        "clear_thinking": Refused("The chat template says which thoughts of earlier messages the model sees."),
    }

    type: Literal["enabled", "disabled", "auto"]
    budget_tokens: int | None = Field(default=None, ge=0, le=MAX_INT)
    """Most tokens of reasoning: then its end is forced."""


class ChatBody(SamplingFields):
    refused = STORE | {
        "functions": Refused("The field is outdated: use tools."),
        "function_call": Refused("The field is outdated: use tool_choice."),
        "audio": Refused(TEXT_ONLY),
        "modalities": Refused(TEXT_ONLY, (["text"],)),
        "web_search_options": Refused("The server does not search the web."),
        "echo": Refused("Only /v1/completions repeats a prompt.", (False,)),
        "add_special_tokens": Refused("The chat template says which special tokens there are.", (False,)),
        "chat_template_content_format": Refused("Content is handed to the template as text.", ("auto", "string")),
        "include_reasoning": Refused("Reasoning is always shown, apart from the content.", (True,)),
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    """The conversation so far, oldest first."""
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    """Most tokens of each choice, reasoning included. null: what the model's makers say, or as many as fit."""
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT)
    """The same under its older name."""
    logprobs: bool = False
    """Answer with the log-probability of each token."""
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """And with those of so many likeliest ones at each place."""
    tools: list[FunctionTool] = Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True)
    """Functions that the model may call."""
    tool_choice: ToolChoice = None
    """`none`, `auto`, `required`, a function by its name, or allowed_tools; the last three bind the answer."""
    parallel_tool_calls: bool = True
    """False: at most one call."""
    reasoning_effort: Effort | None = None
    """Handed to the chat template, if it knows such a thing."""
    enable_thinking: bool | None = None
    """Handed to the chat template, if it knows such a thing, as DashScope and SiliconFlow have it."""
    thinking: Thinking | None = None
    """The same, as DeepSeek, GLM and Doubao have it."""
    thinking_token_budget: int | None = Field(default=None, ge=0, le=MAX_INT)
    """Most tokens of reasoning, as vLLM has it: then its end is forced."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables for the chat template, such as `enable_thinking`."""
    documents: list[dict[str, Any]] | None = Field(default=None, max_length=MAX_PARTS, fail_fast=True)
    """`{"title", "text"}`, for chat templates that quote them."""
    add_generation_prompt: bool | None = None
    """End the prompt with the beginning of the assistant's message. null: unless a message is continued."""
    continue_final_message: bool = False
    """The answer goes on with the last message, the assistant's."""
    metadata: Metadata | None = None
    """Answered as it is; nothing is stored."""
    prompt_cache_key: str | None = None
    """Prompts with the same beginning share it without a key. While weights are tried, equal keys get the same ones."""
    safety_identifier: str | None = None
    """Nothing is made of it but this: while a candidate for the weights is tried, equal ones get the same weights."""

    def check(self, service: Service) -> None:
        super().check(service)
        limits = {"max_tokens": self.max_tokens, "max_completion_tokens": self.max_completion_tokens}
        check_together("how many tokens are generated", limits)
        check_together(
            "whether the model thinks", {"enable_thinking": self.enable_thinking, "thinking.type": self._thinks}
        )
        thinking = None if self.thinking is None else self.thinking.budget_tokens
        budgets = {"thinking_token_budget": self.thinking_token_budget, "thinking.budget_tokens": thinking}
        check_together("how long the model thinks", budgets)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs is given without logprobs.", remedy="Set logprobs to true.", param="top_logprobs"
            )

    @property
    def _thinks(self) -> bool | None:
        return None if self.thinking is None or self.thinking.type == "auto" else self.thinking.type == "enabled"

    def tool_use(self) -> ToolUse:
        functions = [tool.function for tool in self.tools]
        return tool_use(functions, self.tool_choice, SCHEMA_PLACE, is_parallel=self.parallel_tool_calls)

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def max_thinking(self) -> tuple[int | None, str]:
        """Most tokens of reasoning, and the field that says so."""
        if self.thinking_token_budget is not None or self.thinking is None:
            return self.thinking_token_budget, "thinking_token_budget"
        return self.thinking.budget_tokens, "thinking.budget_tokens"

    def prompt(self, template: str | None, use: ToolUse) -> ChatPrompt:
        messages = for_template(self.messages, knows_developer="developer" in (template or ""))
        adds_prompt = self.add_generation_prompt
        if self.continue_final_message:
            check_continued(messages, adds_prompt=bool(adds_prompt))
        return ChatPrompt(
            messages,
            use.tools or None,
            self.documents,
            template_variables(
                template,
                self.chat_template_kwargs,
                effort=self.reasoning_effort,
                thinks=self._thinks if self.enable_thinking is None else self.enable_thinking,
            ),
            add_generation_prompt=not self.continue_final_message if adds_prompt is None else adds_prompt,
            continue_final_message=self.continue_final_message,
        )


@router.post("/v1/chat/completions", dependencies=[Admission], response_model=ChatAnswer)
@router.post("/chat/completions", dependencies=[Admission], response_model=ChatAnswer, include_in_schema=False)
async def create_chat_completion(
    body: ChatBody, request: Request, service: ServiceArgument, request_id: RequestId
) -> Response:
    """Answer a chat."""
    model = body.check_model(service)
    body.check(service)
    use = body.tool_use()
    tokenizer = service.deployment.tokenizer
    params = body.sampling_params(
        service,
        max_new_tokens=chat_token_limit(service, body.max_completion_tokens, body.max_tokens),
        logprobs=body.num_top,
        prompt_logprobs=body.prompt_logprobs,
    )
    prompt = body.prompt(tokenizer.chat_template, use)
    observation = body.observation(wants_trace=body.routed_experts)
    conversation = Conversation(
        prompt, "messages", use, params, body.n, observation, body.form(), max_thinking=body.max_thinking
    )
    version_id = service.choose_weights(body.weights, body.prompt_cache_key or body.safety_identifier or body.user)

    async def answer() -> Response:
        started = await start(service, conversation)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = Head(kind, "chatcmpl", model, version_id)
        answering = _Answering(body, head, tokenizer, use, started)
        if body.stream:
            return stream_of(service, started.choices, answering.events(), request_id)
        return await answering.whole()

    return await unless_client_leaves(request.receive, answer())


@dataclass
class _Answering:
    """One request's choices → what its client gets."""

    body: ChatBody
    head: Head
    tokenizer: Tokenizer
    use: ToolUse
    started: Started

    @property
    def _choices(self) -> Choices:
        return self.started.choices

    async def whole(self) -> Response:
        body, readers = self.body, self.started.readers
        collected = [Collected() for _ in readers]
        parts = [AnswerParts() for _ in readers]
        try:
            async for index, output in self._choices:
                collected[index].add(output)
                parts[index].add(readers[index].read(output, keeps_stop=body.include_stop_str_in_output))
        finally:
            await self._choices.aclose()
        counts = self._counts()
        for index, item in enumerate(collected):
            parts[index].finish()
            counts.num_new_tokens += item.num_tokens
            counts.num_reasoning_tokens += readers[index].num_reasoning_tokens
            assert item.usage is not None
            counts.finish(item.usage, is_first_sample=index == 0)

        def render() -> Response:
            names = self._names()
            content: dict[str, Any] = {
                **self._head_fields(versions_of(item.usage for item in collected)),
                "choices": [self._choice(names, index, item, parts[index]) for index, item in enumerate(collected)],
                "usage": counts.shape(),
            }
            if body.metadata is not None:
                content["metadata"] = body.metadata
            if body.prompt_logprobs is not None:
                content["prompt_logprobs"] = prompt_logprobs(
                    names, self.started.prompt_ids, collected[0].prompt_logprobs, body.prompt_logprobs
                )
            if body.return_token_ids:
                content["prompt_token_ids"] = self.started.prompt_ids
            return OrjsonResponse(content)

        is_long = body.logprobs or body.prompt_logprobs is not None or body.routed_experts
        return await asyncio.to_thread(render) if is_long else render()

    async def events(self) -> AsyncGenerator[bytes]:
        body, counts, names = self.body, self._counts(), self._names()
        readers = self.started.readers
        has_begun: set[int] = set()
        version: int | None = None
        async for index, output in self._choices:
            counts.num_new_tokens += output.num_tokens
            reader = readers[index]
            deltas = reader.read(output, keeps_stop=body.include_stop_str_in_output)
            counts.num_reasoning_tokens = sum(item.num_reasoning_tokens for item in readers)
            if output.usage is not None:
                version = output.usage.version
                counts.finish(output.usage, is_first_sample=index == 0)
            if index not in has_begun:
                has_begun.add(index)
                first: dict[str, Any] = {"delta": {"role": "assistant", "content": "", "refusal": None}}
                if body.return_token_ids:
                    first["prompt_token_ids"] = self.started.prompt_ids
                yield self._event(counts, index, first)
            shapes = [{"delta": _delta_shape(delta)} for delta in deltas]
            if output.token_ids and (body.logprobs or body.return_token_ids):
                self._add_tokens(shapes, names, output)
            for shape in shapes:
                yield self._event(counts, index, shape)
            if output.is_finished:
                yield self._event(counts, index, await self._end(reader, output), version)
        if body.with_usage:
            yield event({**self._head_fields(version), "choices": [], "usage": counts.shape()})

    def _add_tokens(self, shapes: list[dict[str, Any]], names: TokenNames, output: RequestOutput) -> None:
        """The tokens of an output go with the first of its deltas; without any, with an empty one."""
        if not shapes:
            shapes.append({"delta": {}})
        if self.body.num_top is not None:
            content = chat_logprobs(names, output.token_ids, output.logprobs, self.body.num_top)
            shapes[0]["logprobs"] = {"content": content, "refusal": None}
        if self.body.return_token_ids:
            shapes[0]["token_ids"] = output.token_ids

    async def _end(self, reader: AnswerReader, output: RequestOutput) -> dict[str, Any]:
        shape: dict[str, Any] = {
            "delta": {},
            "finish_reason": self._reason(output.finish_reason, has_called=reader.has_called),
            "stop_reason": output.stopped_by,
        }
        if output.trace is not None:
            shape["routed_experts"] = await asyncio.to_thread(routed_experts, output.trace)
        return shape

    def _event(self, counts: TokenCounts, index: int, shape: dict[str, Any], version: int | None = None) -> bytes:
        chunk = {
            **self._head_fields(version),
            "choices": [{"index": index, "logprobs": None, "finish_reason": None, **shape}],
        }
        if self.body.with_usage:
            chunk["usage"] = counts.shape() if self.body.with_usage_always else None
        return event(chunk)

    def _head_fields(self, version: int | None) -> dict[str, Any]:
        return {**self.head.fields(version), "service_tier": "default"}

    def _names(self) -> TokenNames:
        return TokenNames(self.tokenizer, as_ids=self.body.return_tokens_as_token_ids)

    def _counts(self) -> TokenCounts:
        return TokenCounts(len(self.started.prompt_ids))

    def _reason(self, reason: FinishReason | None, *, has_called: bool) -> str:
        """As OpenAI has it: a call that the request itself has named is no reason."""
        if has_called and self.use.name is None and reason is FinishReason.STOP:
            return "tool_calls"
        return reason_of(reason)

    def _choice(self, names: TokenNames, index: int, item: Collected, parts: AnswerParts) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.calls:
            message["tool_calls"] = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in parts.calls.values()
            ]
        elif parts.content is None:
            message["content"] = ""
        if parts.reasoning is not None:
            message |= {"reasoning": parts.reasoning, "reasoning_content": parts.reasoning}
        choice = {
            "index": index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._reason(item.finish_reason, has_called=bool(parts.calls)),
            "stop_reason": item.stopped_by,
        }
        if self.body.num_top is not None:
            content = chat_logprobs(names, item.token_ids, item.logprobs, self.body.num_top)
            choice["logprobs"] = {"content": content, "refusal": None}
        if self.body.return_token_ids:
            choice["token_ids"] = item.token_ids
        if item.trace is not None:
            choice["routed_experts"] = routed_experts(item.trace)
        return choice


def _delta_shape(delta: AnswerDelta) -> dict[str, Any]:
    if isinstance(delta, ContentDelta):
        return {"content": delta.text}
    if isinstance(delta, ReasoningDelta):
        return {"reasoning": delta.text, "reasoning_content": delta.text}
    if delta.name is None:
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.arguments}}]}
    function = {"name": delta.name, "arguments": delta.arguments}
    return {"tool_calls": [{"index": delta.index, "id": delta.id, "type": "function", "function": function}]}
