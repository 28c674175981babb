"""Answers that are streamed into an event loop, and clients that leave."""

import asyncio
import threading
from contextlib import aclosing

import pytest

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason
from amalgam.errors import PromptTooLongError
from tests.engine.fakes import (
    FakeDecoder,
    greedy_tokens,
)
from tests.engine.running import GREEDY, held_engine, is_at_rest, wait_until


class TestStream:
    def test_outputs_arrive_in_the_event_loop(self, make_engine):
        engine = make_engine()

        async def collect(prompt):
            return [output async for output in engine.stream(prompt, GREEDY)]

        async def collect_all():
            return await asyncio.gather(*(collect([token]) for token in range(10, 18)))

        for token, outputs in zip(range(10, 18), asyncio.run(collect_all()), strict=True):
            assert tuple(o.token_ids[0] for o in outputs) == greedy_tokens([token], 12)
            assert outputs[-1].is_finished

    @pytest.mark.parametrize("leaves_by", ["break", "task"])
    def test_leaving_early_frees_slot_and_blocks(self, make_engine, leaves_by):
        decoder = FakeDecoder()
        engine = make_engine(decoder, max_seq_length=1000)
        endless = SamplingParams(max_new_tokens=900, do_sample=False, ignore_eos=True)
        has_left, steps = threading.Event(), []

        def on_step(token_ids):
            steps.append(token_ids)
            if len(steps) == 4:  # the answer cannot end before its reader has left
                assert has_left.wait(60)

        decoder.on_step = on_step

        async def read(limit):
            async with aclosing(engine.stream([5, 6], endless)) as outputs:
                number = 0
                async for _ in outputs:
                    number += 1
                    if number == limit:
                        break

        async def leave():
            if leaves_by == "break":
                await read(limit=2)
            else:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(read(limit=900), timeout=0.02)

        asyncio.run(leave())
        has_left.set()
        wait_until(lambda: is_at_rest(engine))
        assert len(steps) <= 4

    def test_errors_of_submit_come_before_any_output_is_asked_for(self, make_engine):
        engine = make_engine(max_seq_length=20)

        async def submit():
            engine.stream([5] * 20, GREEDY)

        with pytest.raises(PromptTooLongError):
            asyncio.run(submit())

    def test_closing_before_the_first_output_cancels(self, make_engine):
        engine, decoder = held_engine(make_engine)

        async def submit_and_leave():
            async with aclosing(engine.stream([5], GREEDY)):
                assert engine.status().num_running + engine.status().num_waiting == 1

        asyncio.run(submit_and_leave())
        decoder.gate.set()
        wait_until(lambda: is_at_rest(engine))
        assert engine.meter.read().finished[FinishReason.CANCELLED] == 1

    def test_who_ends_a_request_says_what_it_ends_with(self, make_engine):
        engine, decoder = held_engine(make_engine)

        async def submit_and_end():
            async with aclosing(engine.stream([5], GREEDY)) as outputs:
                outputs.cancel(FinishReason.CONTENT_FILTER)
                decoder.gate.set()
                return [output async for output in outputs]

        assert asyncio.run(submit_and_end())[-1].finish_reason is FinishReason.CONTENT_FILTER
        assert engine.meter.read().finished == {FinishReason.CONTENT_FILTER: 1}

    def test_an_event_loop_that_is_gone_does_not_hurt_the_engine(self, make_engine):
        engine, decoder = held_engine(make_engine)
        loop = asyncio.new_event_loop()

        async def submit():
            return engine.stream([5], GREEDY)

        pending = loop.create_task(anext(loop.run_until_complete(submit())))
        loop.run_until_complete(asyncio.sleep(0.01))
        pending.cancel()
        loop.run_until_complete(asyncio.gather(pending, return_exceptions=True))
        loop.close()
        decoder.gate.set()
        assert engine.generate([[6]], GREEDY)[0].token_ids == greedy_tokens([6], 12)
        wait_until(lambda: is_at_rest(engine))
