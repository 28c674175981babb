"""`POST /summarize`: a document of any length → one summary.

In: a text, how it is to be cut. Out: its summary, and those of its chunks; never any of the text itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason, Observation, Usage
from amalgam.errors import RequestError
from amalgam.server.api.chats import encode_chat
from amalgam.server.api.common import MAX_INT, ToolUse, WeightsField
from amalgam.server.api.generate import SamplerFields
from amalgam.server.api.variables import template_variables
from amalgam.server.dependencies import Admission, ServiceArgument
from amalgam.server.generation import complete, run_all
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.service import Service
from amalgam.text.answers.contract import ContentDelta
from amalgam.text.chat import ChatPrompt
from amalgam.text.filters.contract import ContentFilteredError
from amalgam.text.summary import (
    CHUNK_TOKENS,
    MIN_CHUNK_TOKENS,
    OVERLAP_TOKENS,
    SUMMARY_TOKENS,
    Answer,
    Chunk,
    Summary,
    check_sizes,
    cut,
    language_of,
    num_chunks,
    summarizing,
)

router = APIRouter(route_class=StrictRoute, tags=["native"])

Watch = Callable[[int, int], None]  # prompts answered, prompts known of so far


class SummarizeBody(SamplerFields, WeightsField):
    text: Annotated[str, Field(min_length=1)]
    """The document."""
    chunk_tokens: int = Field(default=CHUNK_TOKENS, ge=MIN_CHUNK_TOKENS, le=MAX_INT)
    """Tokens of each chunk, which is summarized by itself. At most `server.max_batch_prompts` chunks."""
    overlap_tokens: int = Field(default=OVERLAP_TOKENS, ge=0, le=MAX_INT)
    """How many of them the next chunk repeats; fewer than a chunk has."""
    max_summary_tokens: int = Field(default=SUMMARY_TOKENS, ge=1, le=MAX_INT)
    """Most tokens of each summary, the last one's too."""
    language: Literal["auto", "en", "zh"] = "auto"
    """In which the model is asked. auto: Chinese for a Chinese text, otherwise English."""
    domain: str | None = Field(default=None, min_length=1, max_length=64)
    """A label under which the expert statistics count this request apart."""

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """What the body says, and `defaults` where it says nothing."""
        return SamplingParams(max_new_tokens=self.max_summary_tokens, **self.given(SamplerFields)).over(defaults)


class SummarizedChunk(BaseModel):
    start: int
    """Of the text, the first character."""
    end: int
    """The one behind the last."""
    tokens: int
    summary: str

    model_config = ConfigDict(use_attribute_docstrings=True)


class SummaryTimings(BaseModel):
    cut_seconds: float
    """Until the text was in chunks."""
    chunk_seconds: float
    """Until each chunk had its summary."""
    merge_seconds: float
    total_seconds: float

    model_config = ConfigDict(use_attribute_docstrings=True)


class SummarizeAnswer(BaseModel):
    summary: str
    """New text only."""
    language: Literal["en", "zh"]
    document_tokens: int
    chunks: list[SummarizedChunk]
    merges: int
    """Rounds in which summaries were merged."""
    prompt_tokens: int
    """Of all prompts."""
    generated_tokens: int
    total_tokens: int
    timings: SummaryTimings
    weight_version: int
    """The one that answered all of them."""

    model_config = ConfigDict(use_attribute_docstrings=True)


@router.post("/summarize", dependencies=[Admission], response_model=SummarizeAnswer)
async def summarize(body: SummarizeBody, request: Request, service: ServiceArgument) -> SummarizeAnswer:
    """Summarize a long document: its chunks side by side, then their summaries, until one is left."""
    limit = service.settings.server.max_batch_prompts
    return await unless_client_leaves(request.receive, summary_of(service, body, max_chunks=limit))


async def summary_of(
    service: Service, body: SummarizeBody, *, max_chunks: int | None = None, watch: Watch | None = None
) -> SummarizeAnswer:
    """
    Raises:
        RequestError: the text is empty, the sizes do not fit each other or the model, there are too many chunks, or the
            model answers with nothing.
        OverloadedError: the queue is full, or there is no room for the first chunk.
    """
    started = time.monotonic()
    service.choose_weights(body.weights)
    check_sizes(body.chunk_tokens, body.overlap_tokens)
    max_tokens = service.deployment.engine.max_prompt_tokens
    if body.chunk_tokens + body.max_summary_tokens > max_tokens:
        raise RequestError(
            f"chunk_tokens is {body.chunk_tokens} and max_summary_tokens {body.max_summary_tokens}.",
            remedy=f"With the request around them they have to fit into the model's {max_tokens + 1} tokens.",
            param="chunk_tokens",
        )
    if not body.text.strip():
        raise RequestError("The text is empty.", remedy="Give one with words.", param="text")
    service.check_room()  # a document that is refused is not read
    if service.filters is not None:
        body = body.model_copy(update={"text": await service.filters.text(body.text, "text")})
    starts = await _token_starts(service, body, max_chunks)
    if not starts:
        raise RequestError("The text has no tokens.", remedy="Give one with words.", param="text")
    if len(starts) > body.chunk_tokens and 3 * body.max_summary_tokens > max_tokens:
        raise RequestError(
            f"max_summary_tokens is {body.max_summary_tokens}.",
            remedy=f"Two summaries and the one of both have to fit into the model's {max_tokens + 1} tokens.",
            param="max_summary_tokens",
        )
    chunks = cut(starts, len(body.text), body.chunk_tokens, body.overlap_tokens)
    language = language_of(body.text) if body.language == "auto" else body.language
    asking = _Asking(service, body.sampling_params(service.default_params), Observation(body.domain), watch)
    rounds = summarizing(body.text, chunks, language, body.chunk_tokens)
    prompts, times = next(rounds), [time.monotonic()]
    while True:
        answers = await asking.all(prompts)
        times.append(time.monotonic())
        try:
            prompts = rounds.send(answers)
        except StopIteration as end:
            summary: Summary = end.value
            break
    if not summary.text:
        raise RequestError(
            "The model has answered without any text.",
            remedy="Raise max_summary_tokens: what a model thinks before it answers counts too.",
            param="max_summary_tokens",
        )
    timings = SummaryTimings(
        cut_seconds=times[0] - started,
        chunk_seconds=times[1] - times[0],
        merge_seconds=times[-1] - times[1],
        total_seconds=times[-1] - started,
    )
    return asking.answer(summary, chunks, language, len(starts), timings)


async def _token_starts(service: Service, body: SummarizeBody, max_chunks: int | None) -> list[int]:
    """In turns, as prompts become tokens: a long text holds up nobody.

    Raises:
        RequestError: there are more than `max_chunks` chunks; told as soon as it is known.
    """
    pieces = service.deployment.tokenizer.token_starts_by_piece(body.text)
    starts: list[int] = []
    while (piece := await service.encoder.turn(lambda: next(pieces, None))) is not None:
        starts += piece
        if max_chunks is not None and num_chunks(len(starts), body.chunk_tokens, body.overlap_tokens) > max_chunks:
            raise RequestError(
                f"The text has {len(starts)} tokens or more: too many chunks.",
                remedy=f"Allowed: server.max_batch_prompts, {max_chunks}. Raise chunk_tokens, or lower overlap_tokens.",
                param="text",
            )
    return starts


@dataclass
class _Asking:
    """Prompts → the model's answers, and what they have taken so far."""

    service: Service
    params: SamplingParams
    observation: Observation
    watch: Watch | None
    num_known: int = 0
    usages: list[Usage] = field(default_factory=list)

    async def all(self, prompts: list[str]) -> list[Answer]:
        self.num_known += len(prompts)
        self._tell()
        return await run_all(self._one, prompts, self.service.max_batch_in_flight, "chunks")

    def answer(
        self, summary: Summary, chunks: list[Chunk], language: Literal["en", "zh"], num_tokens: int,
        timings: SummaryTimings,
    ) -> SummarizeAnswer:  # fmt: skip
        num_prompt = sum(usage.num_prompt_tokens for usage in self.usages)
        num_new = sum(usage.num_new_tokens for usage in self.usages)
        return SummarizeAnswer(
            summary=summary.text,
            language=language,
            document_tokens=num_tokens,
            chunks=[
                SummarizedChunk(start=chunk.start, end=chunk.end, tokens=chunk.num_tokens, summary=text)
                for chunk, text in zip(chunks, summary.chunks, strict=True)
            ],
            merges=summary.num_merges,
            prompt_tokens=num_prompt,
            generated_tokens=num_new,
            total_tokens=num_prompt + num_new,
            timings=timings,
            weight_version=max(usage.version for usage in self.usages),
        )

    async def _one(self, prompt: str) -> Answer:
        service, params = self.service, self.params
        engine, template = service.deployment.engine, service.deployment.tokenizer.chat_template
        if template is None:
            [prompt_ids] = await service.encode([prompt], "text")
            completion = await complete(engine, prompt_ids, params, self.observation)
            text = completion.text
        else:
            variables = template_variables(template, thinks=False)
            message = {"role": "user", "content": prompt}
            chat = await encode_chat(service, ChatPrompt([message], variables=variables), ToolUse(), None, "text")
            keeps = chat.form.keeps_special_tokens or params.keeps_special_tokens
            params = replace(params, continues_prompt=False, keeps_special_tokens=keeps)
            completion = await complete(engine, chat.prompt_ids, params, self.observation)
            parser = chat.form.parser(prompt_end=chat.prompt_end)
            deltas = [*parser.push(completion.text), *parser.finish()]
            text = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        if completion.finish_reason == FinishReason.CONTENT_FILTER:
            raise ContentFilteredError("A filter lets a summary not pass.", param="text")
        self.usages.append(completion.usage)
        self._tell()
        return Answer(text, completion.usage.num_new_tokens)

    def _tell(self) -> None:
        if self.watch is not None:
            self.watch(len(self.usages), self.num_known)
