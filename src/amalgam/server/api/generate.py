"""The native REST interface: /generate and /batch_generate.

In: prompts and sampling parameters. Out: text with its figures, at once or as it comes. The rest of the interface is
in `model_info`, `weights`, `experts` and `exports`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.params import (
    MAX_REPETITION_PENALTY,
    MAX_SEED,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    SamplingParams,
)
from amalgam.engine.request import Observation, RequestOutput, Usage
from amalgam.errors import RequestError
from amalgam.server.api.common import MAX_INT, CommonSampling, WeightsField
from amalgam.server.dependencies import Admission, RequestId, ServiceArgument
from amalgam.server.generation import Completion, complete, complete_all, stream_events
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse

if TYPE_CHECKING:
    from amalgam.models.routing import RoutingTrace

router = APIRouter(route_class=StrictRoute, tags=["native"])


class SamplerFields(CommonSampling):
    """How to sample. The defaults are those of the model's `generation_config.json` where it has any."""

    temperature: float = Field(default=SamplingParams.temperature, ge=0, le=MAX_TEMPERATURE)
    """Divides the logits; 0 is greedy."""
    top_p: float = Field(default=SamplingParams.top_p, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability."""
    top_k: int = Field(default=SamplingParams.top_k, ge=0, le=MAX_INT)
    """Sample from this many of the likeliest tokens; 0: no limit."""
    min_p: float = Field(default=SamplingParams.min_p, ge=0, le=1)
    """Leave out tokens less likely than this share of the likeliest one."""
    do_sample: bool = SamplingParams.do_sample
    """False: always take the likeliest token."""
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    """The same seed gives the same answer. None: a different one each time."""
    repetition_penalty: float = Field(
        default=SamplingParams.repetition_penalty, ge=MIN_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY
    )
    """Above 1: tokens that have appeared become less likely."""


class SamplingFields(SamplerFields):
    max_new_tokens: int = Field(default=SamplingParams.max_new_tokens, ge=1, le=MAX_INT)
    """Most tokens to generate; less if prompt and answer would exceed the model's sequence length."""

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """What the body says, and `defaults` where it says nothing."""
        return SamplingParams(**self.given(SamplingFields)).over(defaults)


class ObservedFields(SamplingFields, WeightsField):
    domain: str | None = Field(default=None, min_length=1, max_length=64)
    """A label under which the expert statistics count this request apart."""
    routed_experts: bool = False
    """Answer with the experts that each token was routed to."""

    def observation(self) -> Observation:
        return Observation(self.domain, self.routed_experts)


class GenerateBody(ObservedFields):
    prompt: str = Field(min_length=1)
    """The text to continue."""
    stream: bool = False
    """Answer with server-sent events as the text comes, ended with `data: [DONE]`. Each has the new `text` and the
    `generated_tokens` so far; the last one has all fields of the answer beside its text."""


class BatchGenerateBody(ObservedFields):
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1, fail_fast=True)
    """The texts to continue; at most `server.max_batch_prompts`."""
    stream: Literal[False] = False
    """Only /generate streams."""


class Timings(BaseModel):
    queue_seconds: float
    first_token_seconds: float
    total_seconds: float
    tokens_per_second: float


class RoutedExperts(BaseModel):
    layer_ids: list[int]
    """The layers that have experts."""
    expert_ids: list[list[list[int]]]
    """Per token (of prompt and answer, but for the last), per layer: its experts, the heaviest first."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class CompletionFigures(BaseModel):
    prompt_tokens: int
    generated_tokens: int
    total_tokens: int
    finish_reason: str
    timings: Timings
    weight_version: int
    routed_experts: RoutedExperts | None = None
    """Only if asked for."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    @classmethod
    def of(cls, usage: Usage, finish_reason: str, **fields: Any) -> Self:
        seconds = usage.total_seconds - usage.queue_seconds - usage.encoding_seconds
        return cls(
            prompt_tokens=usage.num_prompt_tokens,
            generated_tokens=usage.num_new_tokens,
            total_tokens=usage.num_prompt_tokens + usage.num_new_tokens,
            finish_reason=finish_reason,
            timings=Timings(
                queue_seconds=usage.queue_seconds,
                first_token_seconds=usage.first_token_seconds,
                total_seconds=usage.total_seconds,
                tokens_per_second=usage.num_new_tokens / seconds if seconds > 0 else 0.0,
            ),
            weight_version=usage.version,
            **fields,
        )


class GenerateAnswer(CompletionFigures):
    generated_text: str


class BatchGenerateAnswer(BaseModel):
    prompts: list[str]
    generated_texts: list[str]
    details: list[CompletionFigures]


@router.post("/generate", dependencies=[Admission], response_model=GenerateAnswer, response_model_exclude_none=True)
async def generate(
    body: GenerateBody, request: Request, service: ServiceArgument, request_id: RequestId
) -> GenerateAnswer | Response:
    """Continue one prompt."""
    params, observation = body.sampling_params(service.default_params), body.observation()
    service.choose_weights(body.weights)

    async def answer() -> GenerateAnswer | Response:
        [prompt_ids] = await service.encode([body.prompt], "prompt")
        engine = service.deployment.engine
        if body.stream:
            outputs = engine.stream(prompt_ids, params, observation)
            return stream_events(outputs, event_fields, request_id, service.settings.server.stream_comment_seconds)
        completion = await complete(engine, prompt_ids, params, observation)
        result = GenerateAnswer.of(completion.usage, completion.finish_reason, generated_text=completion.text)
        if completion.trace is None:
            return result
        return await asyncio.to_thread(OrjsonResponse, _with_experts(result, completion.trace))

    return await unless_client_leaves(request.receive, answer())


@router.post(
    "/batch_generate", dependencies=[Admission], response_model=BatchGenerateAnswer, response_model_exclude_none=True
)
async def batch_generate(
    body: BatchGenerateBody, request: Request, service: ServiceArgument
) -> BatchGenerateAnswer | Response:
    """Continue several prompts together. The answers are in the prompts' order; one error fails all.

    A batch may be larger than the queue: it never takes more than half of it.
    """
    limit = service.settings.server.max_batch_prompts
    if len(body.prompts) > limit:
        raise RequestError(
            f"prompts has {len(body.prompts)} entries.", remedy=f"Allowed: at most {limit}.", param="prompts"
        )
    params, observation = body.sampling_params(service.default_params), body.observation()
    service.choose_weights(body.weights)

    async def answer() -> list[Completion]:
        prompts_ids = await service.encode(body.prompts, "prompts")
        engine = service.deployment.engine
        return await complete_all(engine, prompts_ids, params, observation, service.max_batch_in_flight)

    completions = await unless_client_leaves(request.receive, answer())
    result = BatchGenerateAnswer(
        prompts=body.prompts,
        generated_texts=[item.text for item in completions],
        details=[CompletionFigures.of(item.usage, item.finish_reason) for item in completions],
    )
    if not body.routed_experts:
        return result
    details = [_with_experts(figures, item.trace) for figures, item in zip(result.details, completions, strict=True)]
    return await asyncio.to_thread(OrjsonResponse, {**result.model_dump(exclude_none=True), "details": details})


def event_fields(output: RequestOutput, num_tokens: int) -> dict[str, Any]:
    """The fields of one event of a stream, after `num_tokens` of the answer; the last one has the figures."""
    if output.usage is None or output.finish_reason is None:
        return {"text": output.text, "generated_tokens": num_tokens}
    figures = CompletionFigures.of(output.usage, output.finish_reason)
    return {"text": output.text, **_with_experts(figures, output.trace)}


def _with_experts(figures: CompletionFigures, trace: RoutingTrace | None) -> dict[str, Any]:
    """An answer's fields, with `RoutedExperts` as arrays: for long answers, lists of millions would stall the loop."""
    fields = figures.model_dump(exclude_none=True)
    if trace is not None:
        fields["routed_experts"] = {"layer_ids": list(trace.layer_ids), "expert_ids": trace.expert_ids}
    return fields
