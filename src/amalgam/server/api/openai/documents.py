"""The shapes of answers, for the OpenAPI description. The endpoints write them as they are; nothing is validated twice.

In: nothing. Out: types. What stands in no shape of OpenAI's is vLLM's, or `routed_experts`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NotRequired

from pydantic import BaseModel
from typing_extensions import TypedDict


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIErrorAnswer(BaseModel):
    """The body of every answer with a status of 400 or more."""

    RESPONSES: ClassVar[dict[int | str, dict[str, Any]]]

    error: OpenAIError


OpenAIErrorAnswer.RESPONSES = {
    "4XX": {"model": OpenAIErrorAnswer, "description": "The request cannot be served as it is"},
    400: {"model": OpenAIErrorAnswer, "description": "A field is missing, unknown, unsupported or out of range"},
    404: {"model": OpenAIErrorAnswer, "description": "There is no such model"},
    503: {"model": OpenAIErrorAnswer, "description": "Loading, draining or overloaded; see Retry-After"},
}


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class UsageShape(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class LegacyLogprobsShape(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: LegacyLogprobsShape | None
    finish_reason: Literal["stop", "length", "content_filter"]
    stop_reason: str | int | None
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]
    prompt_token_ids: NotRequired[list[int]]
    token_ids: NotRequired[list[int]]
    routed_experts: NotRequired[str]


class CompletionAnswer(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageShape


class ToolFunction(TypedDict):
    name: str
    arguments: str


class ToolCallShape(TypedDict):
    id: str
    type: Literal["function"]
    function: ToolFunction


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallShape]]
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]


class ChatTopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(ChatTopLogprob):
    top_logprobs: list[ChatTopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatLogprob]
    refusal: None


class ChatChoice(TypedDict):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls", "content_filter"]
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]
    routed_experts: NotRequired[str]


class ChatAnswer(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    service_tier: Literal["default"]
    choices: list[ChatChoice]
    usage: UsageShape
    metadata: NotRequired[dict[str, str]]
    prompt_logprobs: NotRequired[list[dict[str, Any] | None]]
    prompt_token_ids: NotRequired[list[int]]


class EmbeddingShape(TypedDict):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(TypedDict):
    prompt_tokens: int
    total_tokens: int


class EmbeddingAnswer(TypedDict):
    object: Literal["list"]
    data: list[EmbeddingShape]
    model: str
    system_fingerprint: str
    usage: EmbeddingUsage


class TokenizeAnswer(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Piece(TypedDict):
    """A token as llama-server has it: its text, or its bytes where these are no text by themselves."""

    id: int
    piece: str | list[int]


class ContentTokens(TypedDict):
    """What llama-server answers to `content`."""

    tokens: list[int] | list[Piece]


class DetokenizeAnswer(TypedDict):
    prompt: str
    content: str
    """The same, as llama-server calls it."""


class ResponseInputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class ResponseOutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsageShape(TypedDict):
    input_tokens: int
    input_tokens_details: ResponseInputDetails
    output_tokens: int
    output_tokens_details: ResponseOutputDetails
    total_tokens: int


class ResponseAnswer(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    background: Literal[False]
    error: dict[str, Any] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    system_fingerprint: str
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsageShape | None
    user: str | None
