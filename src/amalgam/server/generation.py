"""Prompts → answers. The bridge between the handlers and the engine's asynchronous streams.

In: token ids and sampling parameters. Out: completions, or server-sent events. Must never know: request models.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from amalgam.engine.fan_out import fan_out
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Observation, RequestOutput, Usage
from amalgam.errors import UnavailableError
from amalgam.server.encoding import naming
from amalgam.server.events import EventStream, event
from amalgam.server.http.errors import error_content
from amalgam.server.interface import Engine, OutputStream

if TYPE_CHECKING:
    from amalgam.models.routing import RoutingTrace

T = TypeVar("T")
P = TypeVar("P")


@dataclass(frozen=True)
class Completion:
    """A finished request: its new text and its figures."""

    text: str
    finish_reason: str
    usage: Usage
    trace: RoutingTrace | None


async def complete(
    engine: Engine, prompt_ids: Sequence[int], params: SamplingParams, observation: Observation
) -> Completion:
    """Run one request to its end. Cancelling the caller cancels the request."""
    texts = []
    async with aclosing(engine.stream(prompt_ids, params, observation)) as outputs:
        async for output in outputs:
            texts.append(checked(output).text)
    assert output.finish_reason is not None
    assert output.usage is not None
    return Completion("".join(texts), output.finish_reason, output.usage, output.trace)


async def complete_all(
    engine: Engine,
    prompts_ids: Sequence[Sequence[int]],
    params: SamplingParams,
    observation: Observation,
    max_in_flight: int,
) -> list[Completion]:
    """Run all requests, see `run_all`.

    Raises:
        OverloadedError: there is no place even for the first.
    """
    check_lengths(engine, prompts_ids, "prompts", 1)
    return await run_all(
        lambda prompt_ids: complete(engine, prompt_ids, params, observation), prompts_ids, max_in_flight
    )


async def run_all(
    run: Callable[[P], Awaitable[T]],
    prompts: Sequence[P],
    max_in_flight: int,
    name: str = "prompts",
) -> list[T]:
    """What `run` gives for each prompt, see `fan_out`. An error is raised with its prompt's index.

    Args:
        name: of the field that the prompts stand in.

    Raises:
        OverloadedError: there is no place even for the first.
    """

    async def run_one(numbered: tuple[int, P]) -> T:
        index, prompt = numbered
        with naming(name, index, len(prompts)):
            return await run(prompt)

    return await fan_out(run_one, list(enumerate(prompts)), max_in_flight, waits_for_first=False)


def check_lengths(engine: Engine, prompts_ids: Sequence[Sequence[int]], name: str, num_new_tokens: int) -> None:
    """To be called before any prompt is computed: an error of one fails all.

    Args:
        name: of the field that they stand in.
        num_new_tokens: that there must be room for.

    Raises:
        PromptTooLongError: one leaves no room for them.
    """
    for index, prompt_ids in enumerate(prompts_ids):
        with naming(name, index, len(prompts_ids)):
            engine.check_prompt_length(len(prompt_ids), num_new_tokens)


def checked(output: RequestOutput) -> RequestOutput:
    """An output, with a failed last one raised as its error."""
    if output.error is not None:
        raise output.error
    if output.is_finished and output.usage is None:
        raise UnavailableError("The server ended this request.", remedy="Send it again.")
    return output


def stream_events(
    outputs: OutputStream,
    describe_output: Callable[[RequestOutput, int], dict[str, Any]],
    request_id: str,
    comment_seconds: float,
) -> EventStream:
    """The outputs of one request as events, ended with `data: [DONE]`.

    Args:
        outputs: of a request that has been taken.
        describe_output: an output, and how many tokens there are so far → the event's fields.
        request_id: named in the log and in the error event of an unexpected failure.
        comment_seconds: see `EventStream`.
    """

    async def events() -> AsyncGenerator[bytes]:
        num_tokens = 0
        async for output in outputs:
            num_tokens += checked(output).num_tokens
            if output.text or output.is_finished:
                yield event(describe_output(output, num_tokens))

    def describe_error(error: Exception) -> bytes:
        return event(error_content(error, request_id))

    return EventStream(outputs, events(), describe_error, request_id, comment_seconds)
