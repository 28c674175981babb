"""`POST /v1/completions`: a text goes on. Also what scores it: `echo` with `logprobs`, and `max_tokens` 0.

In: prompts as texts or token ids. Out: a completion object, or its chunks as events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from amalgam.engine.params import MAX_LOGPROBS
from amalgam.engine.request import RequestOutput
from amalgam.errors import RequestError
from amalgam.server.api.chats import compile_form
from amalgam.server.api.common import MAX_INT
from amalgam.server.api.openai.answers import Head, TokenCounts, reason_of, stream_of, versions_of
from amalgam.server.api.openai.documents import CompletionAnswer, OpenAIErrorAnswer
from amalgam.server.api.openai.fields import SamplingFields
from amalgam.server.api.openai.prompts import EncodedPrompts, PromptLimit, Prompts, TokenIds, encode_prompts
from amalgam.server.api.openai.tokens import LegacyLogprobs, TokenNames, prompt_logprobs, routed_experts
from amalgam.server.api.refusing import Refused
from amalgam.server.choices import Choices, Collected, Wanted
from amalgam.server.dependencies import Admission, RequestId, ServiceArgument
from amalgam.server.events import event
from amalgam.server.http.access import unless_client_leaves
from amalgam.server.http.body import StrictRoute
from amalgam.server.http.errors import OrjsonResponse
from amalgam.server.interface import Tokenizer
from amalgam.server.service import Service

router = APIRouter(route_class=StrictRoute, tags=["openai"], responses=OpenAIErrorAnswer.RESPONSES)


class CompletionBody(SamplingFields):
    refused = {  # noqa: RUF012
        "suffix": Refused("The model cannot fill a gap.", ("",)),
        "prompt_embeds": Refused("Give the prompt as text or token ids."),
    }

    prompt: Prompts
    """A text, a list of texts, token ids, or a list of such lists."""
    max_tokens: int = Field(default=16, ge=0, le=MAX_INT)
    """Most tokens of each choice; 0, with echo or prompt_logprobs, only scores the prompt."""
    best_of: int | None = Field(default=None, ge=1)
    """Accepted if it is n: no more samples are made than are shown."""
    echo: bool = False
    """The choice's text, and its log-probabilities, begin with the prompt."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    """Log-probabilities of the choice's tokens, and of so many likeliest ones at each place."""
    add_special_tokens: bool = True
    """Put around a text what the tokenizer puts there, such as a beginning of sequence."""

    def check(self, service: Service) -> None:
        super().check(service)
        if self.best_of not in (None, self.n):
            raise RequestError(
                f"best_of is {self.best_of} and n is {self.n}.",
                remedy="More samples than n are not made: leave best_of out.",
                param="best_of",
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise RequestError(
                "max_tokens is 0.", remedy="Allowed with echo or prompt_logprobs only.", param="max_tokens"
            )

    @property
    def scored(self) -> int | None:
        """Of how many likeliest tokens the prompt's log-probabilities are wanted; None: of none."""
        wanted = [self.prompt_logprobs]
        if self.echo:
            wanted += [self.logprobs, 0 if self.max_tokens == 0 else None]
        return max((count for count in wanted if count is not None), default=None)


@router.post("/v1/completions", dependencies=[Admission], response_model=CompletionAnswer)
async def create_completion(
    body: CompletionBody, request: Request, service: ServiceArgument, request_id: RequestId
) -> Response:
    """Continue prompts."""
    model = body.check_model(service)
    body.check(service)
    form = body.form()
    params = body.sampling_params(
        service, max_new_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=body.scored
    )
    version_id = service.choose_weights(body.weights, body.user)

    async def answer() -> Response:
        limit = PromptLimit(service.settings.server.max_batch_prompts, "server.max_batch_prompts")
        num_new_tokens = min(1, body.max_tokens)
        prompts = await encode_prompts(
            service,
            "prompt",
            body.prompt,
            limit,
            add_special_tokens=body.add_special_tokens,
            num_new_tokens=num_new_tokens,
        )
        prompts_ids = prompts.token_ids
        constraint = None if form is None else await compile_form(service, form)
        wanted = Wanted(params, body.n, body.observation(wants_trace=body.routed_experts), constraint)
        deployment = service.deployment
        echoes = await _echoes(deployment.tokenizer, prompts) if body.echo else [""] * len(prompts_ids)
        head = Head("text_completion", "cmpl", model, version_id)
        choices = await Choices.submit(deployment.engine, prompts_ids, wanted, service.max_batch_in_flight)
        answering = _Answering(body, head, deployment.tokenizer, prompts_ids, echoes)
        if body.stream:
            return stream_of(service, choices, answering.events(choices), request_id)
        return await answering.whole(choices)

    return await unless_client_leaves(request.receive, answer())


async def _echoes(tokenizer: Tokenizer, prompts: EncodedPrompts) -> list[str]:
    """The text of each prompt, as it was computed."""
    if None not in prompts.texts:
        return [text or "" for text in prompts.texts]
    pairs = list(zip(prompts.texts, prompts.token_ids, strict=True))
    return await asyncio.to_thread(lambda: [tokenizer.decode(ids) if text is None else text for text, ids in pairs])


@dataclass
class _Answering:
    """One request's choices → what its client gets."""

    body: CompletionBody
    head: Head
    tokenizer: Tokenizer
    prompts_ids: Sequence[TokenIds]
    echoes: Sequence[str]

    async def whole(self, choices: Choices) -> Response:
        body = self.body
        collected = [Collected() for _ in range(len(self.prompts_ids) * body.n)]
        try:
            async for index, output in choices:
                collected[index].add(output)
        finally:
            await choices.aclose()
        counts = self._counts()
        for index, item in enumerate(collected):
            counts.num_new_tokens += item.num_tokens
            assert item.usage is not None
            counts.finish(item.usage, is_first_sample=index % body.n == 0)

        def render() -> Response:
            names = self._names()
            content = {
                **self.head.fields(versions_of(item.usage for item in collected)),
                "choices": [self._choice(names, index, item) for index, item in enumerate(collected)],
                "usage": counts.shape(),
            }
            return OrjsonResponse(content)

        is_long = body.logprobs is not None or body.prompt_logprobs is not None or body.routed_experts
        return await asyncio.to_thread(render) if is_long else render()

    async def events(self, choices: Choices) -> AsyncGenerator[bytes]:
        body, counts, names = self.body, self._counts(), self._names()
        has_begun: set[int] = set()
        shapes = {}
        if body.logprobs is not None:
            number = len(self.prompts_ids) * body.n
            shapes = {index: LegacyLogprobs(names, body.logprobs) for index in range(number)}
        version: int | None = None
        async for index, output in choices:
            counts.num_new_tokens += output.num_tokens
            if output.usage is not None:
                version = output.usage.version
                counts.finish(output.usage, is_first_sample=index % body.n == 0)
            is_first = index not in has_begun
            shows_tokens = bool(output.token_ids) and (body.logprobs is not None or body.return_token_ids)
            if not (output.text or output.is_finished or shows_tokens or (is_first and body.echo)):
                continue
            has_begun.add(index)
            make = partial(self._chunk, shapes.get(index), index, output, is_first=is_first)
            is_long = output.trace is not None or output.prompt_logprobs
            choice = await asyncio.to_thread(make) if is_long else make()
            chunk = {**self.head.fields(version if output.is_finished else None), "choices": [choice]}
            if body.with_usage:
                chunk["usage"] = counts.shape() if body.with_usage_always else None
            yield event(chunk)
        if body.with_usage:
            yield event({**self.head.fields(version), "choices": [], "usage": counts.shape()})

    def _names(self) -> TokenNames:
        return TokenNames(self.tokenizer, as_ids=self.body.return_tokens_as_token_ids)

    def _counts(self) -> TokenCounts:
        return TokenCounts(sum(map(len, self.prompts_ids)))

    def _choice(self, names: TokenNames, index: int, item: Collected) -> dict[str, Any]:
        body = self.body
        prompt_ids = self.prompts_ids[index // body.n]
        choice = {
            "index": index,
            "text": self.echoes[index // body.n] + item.text + self._stop_text(item.stopped_by),
            "logprobs": None,
            "finish_reason": reason_of(item.finish_reason),
            "stop_reason": item.stopped_by,
        }
        if body.logprobs is not None:
            shape = LegacyLogprobs(names, body.logprobs)
            ids, entries = self._with_prompt(prompt_ids, item.prompt_logprobs)
            choice["logprobs"] = shape.add([*ids, *item.token_ids], [*entries, *item.logprobs])
        if body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(names, prompt_ids, item.prompt_logprobs, body.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"prompt_token_ids": prompt_ids, "token_ids": item.token_ids}
        if item.trace is not None:
            choice["routed_experts"] = routed_experts(item.trace)
        return choice

    def _chunk(
        self, shape: LegacyLogprobs | None, index: int, output: RequestOutput, *, is_first: bool
    ) -> dict[str, Any]:
        body = self.body
        prompt_ids = self.prompts_ids[index // body.n]
        choice: dict[str, Any] = {
            "index": index,
            "text": (self.echoes[index // body.n] if is_first else "")
            + output.text
            + self._stop_text(output.stopped_by),
            "logprobs": None,
            "finish_reason": reason_of(output.finish_reason) if output.is_finished else None,
        }
        if output.is_finished:
            choice["stop_reason"] = output.stopped_by
        if shape is not None:
            ids, entries = self._with_prompt(prompt_ids, output.prompt_logprobs)
            choice["logprobs"] = shape.add([*ids, *output.token_ids], [*entries, *output.logprobs])
        if body.return_token_ids:
            choice["token_ids"] = output.token_ids
            if is_first:
                choice["prompt_token_ids"] = prompt_ids
        if output.trace is not None:
            choice["routed_experts"] = routed_experts(output.trace)
        return choice

    def _with_prompt(self, prompt_ids: TokenIds, entries: Sequence[Any]) -> tuple[Sequence[int], Sequence[Any]]:
        return (prompt_ids, entries) if self.body.echo and entries else ((), ())

    def _stop_text(self, stopped_by: str | int | None) -> str:
        if not self.body.include_stop_str_in_output or stopped_by is None:
            return ""
        return stopped_by if isinstance(stopped_by, str) else self.tokenizer.token_text(stopped_by)
