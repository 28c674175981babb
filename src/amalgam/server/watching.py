"""What the engine does for one HTTP request, noted in that request's record, and ended in its time.

In: a deployment. Out: the same, whose engine notes tokens, times and reasons in the record of the request that asks.
So no interface needs to know of logs, limits and traces. Must never know: HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, TypeVar

from amalgam.engine.params import MAX_PRIORITY, SamplingParams
from amalgam.engine.request import FinishReason, Observation, PromptProgress, RequestOutput
from amalgam.errors import AmalgamError
from amalgam.server.http.keys import ForbiddenError
from amalgam.server.http.record import PromptUse, RequestRecord, current_record
from amalgam.server.interface import Deployment, Engine, OutputStream
from amalgam.server.wrapping import WrappedDeployment, WrappedEngine

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from amalgam.models.weights import WeightVersion
    from amalgam.text.grammar import CompiledGrammar

T = TypeVar("T")


class RequestTimeoutError(AmalgamError):
    """The request has taken longer than `server.request_seconds`."""

    http_status = 504
    code = "timed_out"


def watched(deployment: Deployment) -> Deployment:
    """`deployment`, with its engine watched."""
    return _WatchedDeployment(deployment)


class _WatchedDeployment(WrappedDeployment):
    @property
    def engine(self) -> Engine:
        return _WatchedEngine(self.wrapped.engine)


class _WatchedEngine(WrappedEngine):
    def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        observation: Observation,
        constraint: CompiledGrammar | None = None,
        version: WeightVersion | None = None,
    ) -> OutputStream:
        """See `Engine.stream`.

        Raises:
            ForbiddenError: the request's priority is not its key's to ask for.
        """
        record = current_record.get()
        if record is None:
            return self.wrapped.stream(prompt_ids, params, observation, constraint, version)
        params, progress = _with_priority(record, params), PromptProgress()
        observation = _watched_by(record, progress, observation)
        outputs = self.wrapped.stream(prompt_ids, params, observation, constraint, version or record.weights)
        return _WatchedStream(outputs, record, record.prompt_use(prompt_ids), progress)

    async def embed(
        self,
        prompt_ids: Sequence[int],
        pooling: Literal["mean", "last"],
        observation: Observation,
        version: WeightVersion | None = None,
        on_output: Callable[[RequestOutput], None] = lambda output: None,
    ) -> npt.NDArray[np.float32]:
        """See `Engine.embed`."""
        record = current_record.get()
        if record is None:
            return await self.wrapped.embed(prompt_ids, pooling, observation, version, on_output)

        def note(output: RequestOutput) -> None:
            _note_version(record, output)
            on_output(output)

        version, progress = version or record.weights, PromptProgress()
        observation = _watched_by(record, progress, observation)
        result = self.wrapped.embed(prompt_ids, pooling, observation, version, note)
        try:
            return await _in_time(record, result)
        finally:
            record.add_prompt(PromptUse(prompt_ids), progress.num_tokens)


class _WatchedStream:
    def __init__(
        self,
        outputs: OutputStream,
        record: RequestRecord,
        prompt: PromptUse,
        progress: PromptProgress,
    ) -> None:
        self._outputs = outputs
        self._record = record
        self._prompt = prompt
        self._progress = progress

    def __aiter__(self) -> _WatchedStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._record.deadline is None:
            output = await self._outputs.__anext__()
        else:
            output = await _in_time(self._record, self._outputs.__anext__())
        self._record.add_prompt(self._prompt, self._progress.num_tokens)
        _note_output(self._record, output)
        return output

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self._outputs.cancel(reason)

    async def aclose(self) -> None:
        await self._outputs.aclose()
        self._record.add_prompt(self._prompt, self._progress.num_tokens)  # no step begins with it after that


def _with_priority(record: RequestRecord, params: SamplingParams) -> SamplingParams:
    if params.priority < 0 and not record.may_overtake:
        raise ForbiddenError(
            f"priority is {params.priority}, and would pass others by.",
            remedy="Allowed for this key: 0, or more to be taken later; the admin key may ask for less.",
            param="priority",
        )
    if not record.priority:
        return params
    priority = min(max(record.priority + params.priority, -MAX_PRIORITY), MAX_PRIORITY)
    return replace(params, priority=priority)


def _watched_by(record: RequestRecord, progress: PromptProgress, observation: Observation) -> Observation:
    return replace(observation, arrived_at=record.received_at, may_move=record.may_move, progress=progress)


async def _in_time(record: RequestRecord, result: Awaitable[T]) -> T:
    """
    Raises:
        RequestTimeoutError: the request's deadline came first.
    """
    try:
        async with asyncio.timeout_at(record.deadline):
            return await result
    except TimeoutError:
        raise RequestTimeoutError(
            "The request has taken longer than server.request_seconds.", remedy="Ask for fewer tokens."
        ) from None


def _note_version(record: RequestRecord, output: RequestOutput) -> None:
    """It may be another one than was chosen, which could not answer; none if the request never ran."""
    if output.usage is not None and output.usage.version:
        record.weight_version = output.usage.version


def _note_output(record: RequestRecord, output: RequestOutput) -> None:
    record.add_new_tokens(len(output.token_ids))
    if output.finish_reason is None:
        return
    record.finish_reasons.append(output.finish_reason.value)
    _note_version(record, output)
    if output.usage is not None:
        record.num_cached_tokens += output.usage.num_cached_tokens
        record.queue_seconds = max(record.queue_seconds or 0.0, output.usage.queue_seconds)
