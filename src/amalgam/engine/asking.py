"""The ways to ask an engine: of requests with callbacks, which the step thread calls, an asynchronous stream is made,
or an answer to each of a batch.

In: prompts as token ids. Out: `RequestOutput`s, `Generation`s. Must never know: the step loop, tensors, HTTP.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import aclosing
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from amalgam.engine.fan_out import ROOM_SECONDS, fan_out
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason, Generation, Observation, OutputCallback, Pooling, RequestOutput
from amalgam.errors import OverloadedError, RequestError, UnavailableError
from amalgam.text.grammar import CompiledGrammar

if TYPE_CHECKING:
    from amalgam.models.weights import WeightVersion

UNLABELLED = Observation()


class OutputStream:
    """The outputs of one submitted request, in an event loop. To be closed, which cancels it unless it has ended."""

    def __init__(self, engine: Asking, submit: Callable[[OutputCallback], int]) -> None:
        loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._engine = engine
        self._is_finished = False

        def on_output(output: RequestOutput) -> None:
            if not self._is_finished:  # what a cancelled request still says may come when the loop has ended
                loop.call_soon_threadsafe(self._outputs.put_nowait, output)

        self._request_id = submit(on_output)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._is_finished:
            raise StopAsyncIteration
        output = await self._outputs.get()
        self._is_finished = output.is_finished
        return output

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Have the request end, with `reason`; its last output still comes."""
        if not self._is_finished:
            self._engine.cancel(self._request_id, reason)

    async def aclose(self) -> None:
        """Cancel the request if it goes on."""
        if not self._is_finished:
            self._is_finished = True
            self._engine.cancel(self._request_id)


class Asking(ABC):
    """Whoever takes requests and calls back can be asked in these ways.

    Args:
        max_in_flight: requests of one batch that are submitted at a time.
    """

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight

    @abstractmethod
    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        on_output: OutputCallback,
        observation: Observation = UNLABELLED,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> int:
        """Queue a request and return its id."""

    @abstractmethod
    def submit_embedding(
        self,
        prompt_ids: Sequence[int],
        pooling: Pooling,
        on_output: OutputCallback,
        observation: Observation = UNLABELLED,
        version: WeightVersion | None = None,
    ) -> int:
        """Queue a request for one vector, which its only output carries."""

    @abstractmethod
    def cancel(self, request_id: int, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request. A finished one stays as it is."""

    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        observation: Observation = UNLABELLED,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> OutputStream:
        """Submit a request; its outputs as they come. Closing it early cancels the request: use `contextlib.aclosing`.

        Raises the errors of `submit`.
        """
        return OutputStream(
            self, lambda on_output: self.submit(prompt_ids, params, on_output, observation, constraint, version)
        )

    def generate(
        self,
        prompts_ids: Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
        observation: Observation = UNLABELLED,
        watch: Callable[[int, RequestOutput], None] | None = None,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> list[Generation]:
        """Run requests to their end and return the answers in order. Blocks; an interrupt cancels them.

        `watch` is called in this thread with a prompt's index and each output as it comes; what it raises cancels too.
        `params` is for all prompts, or one for each. Raises the errors of `submit`; a request that fails later has its
        error in its `Generation`.
        """
        per_prompt = [params] * len(prompts_ids) if isinstance(params, SamplingParams) else list(params)
        if len(per_prompt) != len(prompts_ids):
            raise RequestError(
                f"There are {len(prompts_ids)} prompts and {len(per_prompt)} sampling parameters.",
                remedy="Give one for all, or one for each.",
            )

        def submit(index: int, on_output: OutputCallback) -> int:
            return self.submit(prompts_ids[index], per_prompt[index], on_output, observation, constraint, version)

        return [_collect(parts) for parts in _run_all(self, len(prompts_ids), submit, self._max_in_flight, watch)]

    async def generate_async(
        self,
        prompts_ids: Sequence[Sequence[int]],
        params: SamplingParams,
        observation: Observation = UNLABELLED,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> list[Generation]:
        """`generate`, awaited. Cancelling the caller cancels the requests."""

        async def answer(prompt_ids: Sequence[int]) -> Generation:
            async with aclosing(self.stream(prompt_ids, params, observation, constraint, version)) as outputs:
                return _collect([output async for output in outputs])

        return await fan_out(answer, prompts_ids, self._max_in_flight)

    async def embed(
        self,
        prompt_ids: Sequence[int],
        pooling: Pooling = "mean",
        observation: Observation = UNLABELLED,
        version: WeightVersion | None = None,
        on_output: Callable[[RequestOutput], None] = lambda output: None,
    ) -> npt.NDArray[np.float32]:
        """One vector `[hidden]` for a prompt: of the final norm's outputs the mean over its tokens, or the last one's.

        It is not scaled to a length. Computed in turn with answers; cancelling the caller cancels the request. Raises
        the errors of `submit`.

        Args:
            on_output: is told how the request ended, and on which version.
        """
        outputs = OutputStream(
            self, lambda on_output: self.submit_embedding(prompt_ids, pooling, on_output, observation, version)
        )
        async with aclosing(outputs):
            output = await anext(outputs)
            on_output(output)
            return _embedding(output)

    def embed_all(
        self, prompts_ids: Sequence[Sequence[int]], pooling: Pooling = "mean", observation: Observation = UNLABELLED
    ) -> list[npt.NDArray[np.float32]]:
        """`embed` of several prompts together. Blocks; an interrupt cancels them."""

        def submit(index: int, on_output: OutputCallback) -> int:
            return self.submit_embedding(prompts_ids[index], pooling, on_output, observation)

        return [_embedding(parts[-1]) for parts in _run_all(self, len(prompts_ids), submit, self._max_in_flight, None)]

    async def embed_all_async(
        self, prompts_ids: Sequence[Sequence[int]], pooling: Pooling = "mean", observation: Observation = UNLABELLED
    ) -> list[npt.NDArray[np.float32]]:
        """`embed_all`, awaited. Cancelling the caller cancels the requests."""
        return await fan_out(
            lambda prompt_ids: self.embed(prompt_ids, pooling, observation), prompts_ids, self._max_in_flight
        )


def _embedding(output: RequestOutput) -> npt.NDArray[np.float32]:
    if output.error is not None:
        raise output.error
    if output.embedding is None:
        raise UnavailableError("The request was cancelled.", remedy="Send it again.")
    return output.embedding


def _run_all(
    engine: Asking,
    num_requests: int,
    submit_one: Callable[[int, OutputCallback], int],
    max_in_flight: int,
    watch: Callable[[int, RequestOutput], None] | None,
) -> list[list[RequestOutput]]:
    """Run requests to their end, and return the outputs of each. At most `max_in_flight` are submitted at a time; where
    others fill the queue, the rest wait for room.
    """
    arrived: SimpleQueue[tuple[int, RequestOutput]] = SimpleQueue()
    outputs: list[list[RequestOutput]] = [[] for _ in range(num_requests)]
    in_flight: dict[int, int] = {}  # index → request id
    num_submitted = 0
    has_left = False

    def submit(index: int) -> None:
        def on_output(output: RequestOutput) -> None:
            if has_left:  # an interrupt may come before the request's id is noted below
                engine.cancel(output.request_id)
            else:
                arrived.put((index, output))

        in_flight[index] = submit_one(index, on_output)

    try:
        while num_submitted < num_requests or in_flight:
            if num_submitted < num_requests and len(in_flight) < max_in_flight:
                try:
                    submit(num_submitted)
                    num_submitted += 1
                    continue
                except OverloadedError:
                    has_room = False
            else:
                has_room = True
            try:
                index, output = arrived.get(timeout=None if has_room else ROOM_SECONDS)
            except Empty:
                continue
            outputs[index].append(output)
            if watch is not None:
                watch(index, output)
            if output.is_finished:
                del in_flight[index]
    finally:
        has_left = True
        for request_id in in_flight.values():
            engine.cancel(request_id)
    return outputs


def _collect(outputs: Sequence[RequestOutput]) -> Generation:
    last = outputs[-1]
    assert last.finish_reason is not None
    assert last.usage is not None
    return Generation(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        error=last.error,
        trace=last.trace,
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
        stopped_by=last.stopped_by,
    )
