"""Prompts × samples → choices: several requests of one client, answered together.

In: token ids, sampling parameters, how many samples of each prompt. Out: outputs with the index of their choice, as
they come. Must never know: request models, the shapes of answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from amalgam.engine.fan_out import ROOM_SECONDS
from amalgam.engine.params import MAX_SEED, SamplingParams
from amalgam.engine.request import FinishReason, Observation, RequestOutput, TokenLogprobs, Usage
from amalgam.errors import OverloadedError
from amalgam.server.encoding import naming
from amalgam.server.generation import check_lengths, checked
from amalgam.server.interface import Engine, OutputStream

if TYPE_CHECKING:
    from amalgam.models.routing import RoutingTrace
    from amalgam.text.grammar import CompiledGrammar


@dataclass(frozen=True)
class Wanted:
    """What is asked for each prompt.

    Attributes:
        num_samples: of each prompt; sample i has `seed + i` if there is a seed.
        constraint: what every answer has to look like.
        prompt_field: of the request, that has the prompts.
    """

    params: SamplingParams
    num_samples: int
    observation: Observation
    constraint: CompiledGrammar | None = None
    prompt_field: str = "prompt"

    def of_sample(self, index: int) -> SamplingParams:
        seed = self.params.seed
        return self.params if seed is None or not index else replace(self.params, seed=(seed + index) % (MAX_SEED + 1))


class Choices:
    """`(index, output)` of each sample of each prompt; sample s of prompt p has the index `p * num_samples + s`.

    The samples of a prompt enter the queue together. Prompts wait for room behind the first one. An error of one ends
    the iteration. To be closed, which cancels what goes on.
    """

    def __init__(
        self, engine: Engine, prompts_ids: Sequence[Sequence[int]], wanted: Wanted, max_in_flight: int
    ) -> None:
        self._engine = engine
        self._prompts_ids = prompts_ids
        self._wanted = wanted
        self._max_in_flight = max_in_flight
        self._num_submitted = 0  # prompts
        self._open: dict[int, OutputStream] = {}
        self._pumps: dict[int, asyncio.Task[None]] = {}
        self._arrived: asyncio.Queue[tuple[int, RequestOutput] | BaseException] = asyncio.Queue()

    @classmethod
    async def submit(
        cls, engine: Engine, prompts_ids: Sequence[Sequence[int]], wanted: Wanted, max_in_flight: int
    ) -> Self:
        """Begin with the first prompt, and with what follows it as far as there is room.

        Args:
            max_in_flight: requests at a time; the samples of one prompt may be more.

        Raises:
            OverloadedError: there is no room for the first prompt's samples.
            RequestError, UnavailableError: see `Engine.stream`.
        """
        check_lengths(engine, prompts_ids, wanted.prompt_field, min(1, wanted.params.max_new_tokens))
        choices = cls(engine, prompts_ids, wanted, max_in_flight)
        try:
            await choices._submit_next()
        except BaseException:
            await choices.aclose()
            raise
        return choices

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if len(self._prompts_ids) * self._wanted.num_samples == 1:  # the usual case
            if not self._open:
                raise StopAsyncIteration
            output = checked(await self._open[0].__anext__())
            if output.is_finished:
                del self._open[0]
            return 0, output
        while self._open or self._num_submitted < len(self._prompts_ids):
            has_room = await self._submit_what_fits()
            for index in self._open.keys() - self._pumps.keys():
                self._pumps[index] = asyncio.create_task(self._pump(index, self._open[index]))
            try:
                async with asyncio.timeout(None if has_room else ROOM_SECONDS):
                    arrived = await self._arrived.get()
            except TimeoutError:
                continue
            if isinstance(arrived, BaseException):
                raise arrived
            if arrived[1].is_finished:
                del self._open[arrived[0]]
            return arrived
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel every request that goes on."""
        pumps = list(self._pumps.values())
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        while self._open:
            await self._open.popitem()[1].aclose()
        self._num_submitted = len(self._prompts_ids)

    async def _submit_what_fits(self) -> bool:
        """Whether the rest waits for our own requests only, and not for room that others make."""
        while self._num_submitted < len(self._prompts_ids):
            if self._open and len(self._open) + self._wanted.num_samples > self._max_in_flight:
                break
            try:
                await self._submit_next()
            except OverloadedError:
                return False
        return True

    async def _submit_next(self) -> None:
        index, wanted = self._num_submitted, self._wanted
        streams: list[OutputStream] = []
        try:
            with naming(wanted.prompt_field, index, len(self._prompts_ids)):
                num_new_tokens = min(1, wanted.params.max_new_tokens)
                prompt_ids = self._engine.checked_prompt(self._prompts_ids[index], num_new_tokens)
                with self._engine.between_steps():
                    for sample in range(wanted.num_samples):
                        params = wanted.of_sample(sample)
                        streams.append(self._engine.stream(prompt_ids, params, wanted.observation, wanted.constraint))
        except BaseException:
            for stream in streams:
                await stream.aclose()
            raise
        self._open |= {index * wanted.num_samples + sample: stream for sample, stream in enumerate(streams)}
        self._num_submitted += 1

    async def _pump(self, index: int, stream: OutputStream) -> None:
        try:
            async for output in stream:
                self._arrived.put_nowait((index, checked(output)))
        except Exception as error:
            self._arrived.put_nowait(error)


@dataclass
class Collected:
    """The outputs of one choice, put together."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    trace: RoutingTrace | None = None
    stopped_by: str | int | None = None

    def add(self, output: RequestOutput) -> None:
        self.texts.append(output.text)
        self.token_ids += output.token_ids
        self.num_tokens += output.num_tokens
        self.logprobs += output.logprobs
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        if output.is_finished:
            self.finish_reason, self.usage, self.trace = output.finish_reason, output.usage, output.trace
            self.stopped_by = output.stopped_by

    @property
    def text(self) -> str:
        return "".join(self.texts)
