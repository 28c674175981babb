"""Several requests of one client, answered together, on an engine with little room."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason, Observation, RequestOutput, Usage
from amalgam.errors import OverloadedError, PromptTooLongError
from amalgam.server.choices import Choices, Wanted
from tests.errors import raises

USAGE = Usage(1, 2, 0.0, 0.0, 0.0, 1)


class Stream:
    """Two outputs, each when the loop comes by."""

    def __init__(self, engine: Engine, prompt_ids: Sequence[int]) -> None:
        self.engine, self.prompt_ids, self.num_sent = engine, prompt_ids, 0

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self.num_sent == 2:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        self.num_sent += 1
        if self.prompt_ids[0] == 13:
            raise RuntimeError("unlucky")
        if self.num_sent == 2:
            self.engine.running.discard(self)
            return RequestOutput(0, "b", (2,), FinishReason.LENGTH, usage=USAGE)
        return RequestOutput(0, f"{self.prompt_ids[0]}", (1,))

    async def aclose(self) -> None:
        self.engine.running.discard(self)


class Engine:
    def __init__(self, max_running: int) -> None:
        self.max_running = max_running
        self.running: set[Stream] = set()
        self.most = 0
        self.seeds: list[int | None] = []
        self.is_between_steps = False
        self.checked: list[Sequence[int]] = []

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        self.is_between_steps = True
        try:
            yield
        finally:
            self.is_between_steps = False

    def check_prompt_length(self, num_tokens: int, num_new_tokens: int = 1) -> None:
        if num_tokens > 4:
            raise PromptTooLongError(f"The prompt has {num_tokens} tokens.", remedy="Allowed: 4.")

    def checked_prompt(self, prompt_ids: Sequence[int], num_new_tokens: int = 1) -> Sequence[int]:
        assert not self.is_between_steps
        self.checked.append(tuple(prompt_ids))
        return self.checked[-1]

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams, observation: Any, constraint: Any) -> Stream:
        assert self.is_between_steps
        assert prompt_ids is self.checked[-1]
        if len(self.running) >= self.max_running:
            raise OverloadedError("The queue is full.")
        self.seeds.append(params.seed)
        stream = Stream(self, prompt_ids)
        self.running.add(stream)
        self.most = max(self.most, len(self.running))
        return stream


def collect(
    engine: Engine, prompts: Sequence[Sequence[int]], num_samples: int = 1, seed: int | None = None
) -> list[str]:
    async def run() -> list[str]:
        wanted = Wanted(SamplingParams(seed=seed), num_samples, Observation())
        choices = await Choices.submit(engine, prompts, wanted, max_in_flight=8)  # type: ignore[arg-type]
        texts = [""] * (len(prompts) * num_samples)
        try:
            async for index, output in choices:
                texts[index] += output.text
        finally:
            await choices.aclose()
            assert not engine.running
        return texts

    return asyncio.run(run())


@pytest.mark.parametrize("max_running", [1, 2, 100])
def test_prompts_wait_for_room_behind_the_first(max_running: int) -> None:
    engine = Engine(max_running)
    assert collect(engine, [[index] for index in range(10)]) == [f"{index}b" for index in range(10)]
    assert engine.most == min(max_running, 8)


def test_the_samples_of_a_prompt_enter_together_with_seeds_of_their_own() -> None:
    engine = Engine(3)
    assert collect(engine, [[5], [6]], num_samples=3, seed=40) == ["5b"] * 3 + ["6b"] * 3
    assert engine.seeds[:3] == engine.seeds[-3:] == [40, 41, 42]


def test_a_prompt_is_checked_once_whatever_the_number_of_samples_and_while_steps_go_on() -> None:
    engine = Engine(6)
    collect(engine, [[5], [6]], num_samples=3)
    assert engine.checked == [(5,), (6,)]


def test_no_room_for_the_first_is_told_at_once_and_leaves_nothing() -> None:
    engine = Engine(2)
    with raises(OverloadedError):
        collect(engine, [[1], [2]], num_samples=3)
    assert not engine.running


def test_an_error_of_one_ends_all() -> None:
    engine = Engine(100)
    with pytest.raises(RuntimeError):
        collect(engine, [[1], [13], [2]])
    assert not engine.running


def test_a_prompt_that_is_too_long_is_named_before_any_is_computed() -> None:
    engine = Engine(100)
    with raises(PromptTooLongError, 5) as caught:
        collect(engine, [[1], [1] * 5])
    assert caught.value.__notes__ == ["This is prompt[1]"]
    assert engine.most == 0
