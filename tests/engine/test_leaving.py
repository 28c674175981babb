"""Requests that are cancelled, one or a thousand of them."""

import _thread
import asyncio
import gc
import random
import signal
import threading
from collections import Counter
from contextlib import aclosing
from dataclasses import replace

import pytest

from amalgam.engine import core
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason, Observation, PromptProgress, Request
from amalgam.errors import PromptTooLongError
from tests.engine.fakes import VOCAB_SIZE, FakeDecoder, FakeVersion, greedy_tokens, kv_cache_bytes
from tests.engine.running import (
    GREEDY,
    TINY_CACHE,
    all_made,
    held_engine,
    is_at_rest,
    random_prompts,
    wait_until,
)


class TestCancelling:
    def test_a_running_and_a_waiting_request(self, make_engine, submit):
        engine, decoder = held_engine(make_engine, starts=False, max_batch_size=2)
        first, second, waiting = [submit(engine, [token]) for token in (5, 6, 7)]
        engine.start()  # only now, so that the first step takes both
        wait_until(lambda: engine.status().num_running == 2)
        for outputs in (second, waiting):
            engine.cancel(outputs.request_id)
            engine.cancel(outputs.request_id)
        decoder.gate.set()
        for outputs in (second, waiting):
            assert outputs.last().finish_reason is FinishReason.CANCELLED
            assert outputs.token_ids == ()
        assert waiting.last().usage.version == 0
        first.last()
        assert first.token_ids == greedy_tokens([5], 12)
        wait_until(lambda: is_at_rest(engine))

    def test_an_event_loop_that_has_ended_is_told_nothing(self, make_engine, caplog):
        engine, decoder = held_engine(make_engine)

        async def leave():
            await engine.stream([5], GREEDY).aclose()

        asyncio.run(leave())
        decoder.gate.set()
        wait_until(lambda: is_at_rest(engine))
        assert not caplog.records

    def test_what_was_computed_of_the_prompts_is_known(self, make_engine):
        engine, decoder = held_engine(make_engine, max_step_tokens=16, max_batch_size=1)
        running, waiting = PromptProgress(), PromptProgress()

        async def leave():
            streams = [
                engine.stream([5] * 50, GREEDY, Observation(progress=progress)) for progress in (running, waiting)
            ]
            wait_until(lambda: running.num_tokens)
            for stream in streams:
                await stream.aclose()

        asyncio.run(leave())
        decoder.gate.set()
        wait_until(lambda: is_at_rest(engine))
        assert (running.num_tokens, waiting.num_tokens) == (16, 0)

    def test_the_prompt_of_an_answer_was_computed_once_whatever_is_preempted(self, make_engine):
        engine = make_engine(**TINY_CACHE)
        prompts = random_prompts(20)
        progresses = [PromptProgress() for _ in prompts]

        async def answer(prompt_ids, progress):
            async with aclosing(engine.stream(prompt_ids, GREEDY, Observation(progress=progress))) as outputs:
                reasons = []
                async for output in outputs:
                    assert progress.num_tokens == len(prompt_ids)
                    reasons.append(output.finish_reason)
                return reasons[-1]

        async def answer_all():
            return await asyncio.gather(*map(answer, prompts, progresses))

        assert set(asyncio.run(answer_all())) == {FinishReason.LENGTH}

    def test_slot_and_blocks_are_free_in_the_next_step(self, make_engine, submit):
        decoder = FakeDecoder()
        engine = make_engine(decoder, max_seq_length=64, max_batch_size=1, kv_cache_bytes=kv_cache_bytes(16))
        steps = []
        endless = SamplingParams(max_new_tokens=60, do_sample=False, ignore_eos=True)

        def on_step(token_ids):
            steps.append(token_ids)
            if len(steps) == 3:
                engine.cancel(first.request_id)

        decoder.on_step = on_step
        decoder.gate.clear()
        first, second = submit(engine, [5], endless), submit(engine, [6, 7])
        decoder.gate.set()
        second.last()
        assert steps[3] == [6, 7]
        assert len(first.token_ids) == 2

    def test_what_is_over_or_unknown_is_left_alone(self, make_engine, submit):
        engine = make_engine()
        outputs = submit(engine, [5])
        assert outputs.last().finish_reason is FinishReason.LENGTH
        engine.cancel(outputs.request_id)
        engine.cancel(12345)
        assert engine.generate([[6]], GREEDY)[0].token_ids == greedy_tokens([6], 12)

    def test_an_interrupt_cancels_what_generate_began(self, make_engine, monkeypatch):
        decoder = FakeDecoder()
        engine = make_engine(decoder)
        begun, cancelled, steps = [], set(), []
        has_begun, is_over = threading.Event(), threading.Event()
        submit, cancel = engine.submit, engine.cancel

        def noted_submit(*arguments):
            begun.append(submit(*arguments))
            if len(begun) == 2:
                has_begun.set()
            return begun[-1]

        def noted_cancel(request_id):
            cancel(request_id)
            cancelled.add(request_id)
            if len(cancelled) == 2:
                is_over.set()

        def on_step(token_ids):
            steps.append(token_ids)
            if len(steps) == 3:
                assert has_begun.wait(60)
                _thread.interrupt_main()
            if len(steps) >= 3:
                is_over.wait(0.1)  # the interrupt is seen when an output arrives, however late the main thread runs

        decoder.on_step = on_step
        monkeypatch.setattr(engine, "submit", noted_submit)
        monkeypatch.setattr(engine, "cancel", noted_cancel)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            with pytest.raises(KeyboardInterrupt):
                engine.generate([[5], [6]], SamplingParams(max_new_tokens=250, do_sample=False, ignore_eos=True))
        finally:
            signal.signal(signal.SIGINT, handler)
        wait_until(lambda: is_at_rest(engine))
        assert cancelled == set(begun)
        assert len(steps) < 250

    def test_a_refused_prompt_cancels_the_others_of_its_call(self, make_engine):
        engine = make_engine(max_seq_length=64)
        with pytest.raises(PromptTooLongError):
            engine.generate([[5], [6] * 64], GREEDY)
        wait_until(lambda: is_at_rest(engine))


def num_requests():
    gc.collect()
    return sum(isinstance(each, Request) for each in gc.get_objects())


class TestThousandLeave:
    """At every stage: waiting, within a prompt, streaming, sharing blocks or about to."""

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # of modules that the collector's objects belong to
    def test_blocks_and_objects_are_where_they_were(self, make_engine, monkeypatch):
        rng, decoder = random.Random(11), FakeDecoder()
        schedulers = all_made(monkeypatch, core, "Scheduler")
        engine = make_engine(
            decoder, max_seq_length=64, kv_cache_bytes=kv_cache_bytes(60), max_step_tokens=16, max_queue=4096
        )
        beginnings = [[rng.randrange(3, VOCAB_SIZE) for _ in range(40)] for _ in range(12)]
        params = SamplingParams(max_new_tokens=64, do_sample=False, ignore_eos=True)
        engine.generate(beginnings, replace(params, max_new_tokens=2))  # whatever is made once
        before = num_requests()
        has_ended, stages, waiting = threading.Semaphore(0), Counter(), []

        def on_output(output):
            if output.is_finished:
                assert output.finish_reason in (FinishReason.CANCELLED, FinishReason.LENGTH)
                usage = output.usage
                stages["streaming" if usage.num_new_tokens else "prompt" if usage.version else "waiting"] += 1
                has_ended.release()

        def leave(token_ids):
            running = schedulers[0].running
            for request in rng.sample(running, len(running) // 3):
                engine.cancel(request.request_id)
            engine.cancel(waiting.pop(rng.randrange(len(waiting))) if waiting else 0)

        decoder.on_step = leave
        for _ in range(20):
            with engine.between_steps():
                for _ in range(50):
                    ending = [rng.randrange(3, VOCAB_SIZE)] * rng.randint(1, 9)
                    prompt = rng.choice(beginnings)[: rng.randint(20, 40)] + ending
                    waiting.append(engine.submit(prompt, replace(params, priority=rng.randint(0, 2)), on_output))
            engine.set_version(FakeVersion(engine.version.version_id + rng.randint(0, 1)))
        for _ in range(1000):
            assert has_ended.acquire(timeout=60)
        assert len(stages) == 3 and min(stages.values()) > 50
        wait_until(lambda: is_at_rest(engine))
        assert engine.meter.read().counts.num_prefix_hit_tokens > 0
        wait_until(lambda: num_requests() <= before)  # the engine's thread has let go of the last one
        decoder.on_step = lambda token_ids: None
        assert engine.generate([[5]], GREEDY)[0].token_ids == greedy_tokens([5], 12, engine.version.version_id)
