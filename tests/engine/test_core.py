"""The whole engine over a decoder that notices every wrong block, version and order."""

import asyncio
import gc
import logging
import queue
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from amalgam.config.settings import StatisticsSettings
from amalgam.engine.params import SamplingParams, ThinkingLimit
from amalgam.engine.request import FinishReason, Observation
from amalgam.engine.scheduler import Scheduler
from amalgam.engine.speculation.costs import CostModel
from amalgam.engine.speculation.speculator import Speculator
from amalgam.errors import OverloadedError, PromptTooLongError, RequestError, UnavailableError
from amalgam.experts.tracker import ExpertTracker
from amalgam.text.parts import TokenizerParts
from amalgam.text.tokenizer import Tokenizer
from tests.engine.fakes import (
    VOCAB_SIZE,
    FakeDecoder,
    FakeVersion,
    FunctionProposer,
    greedy_tokens,
    kv_cache_bytes,
)
from tests.engine.running import GREEDY, TINY_CACHE, Outputs, held_engine, is_at_rest, random_prompts, wait_until
from tests.errors import is_named, raises


class TestAnswers:
    def test_concurrent_requests_get_the_tokens_that_they_get_alone(self, make_engine):
        prompts = random_prompts(40)
        engine = make_engine(**TINY_CACHE)
        answers = engine.generate(prompts, GREEDY)
        assert [answer.token_ids for answer in answers] == [greedy_tokens(prompt, 12) for prompt in prompts]
        assert is_at_rest(engine)

    def test_sampled_answers_depend_on_the_seed_and_not_on_the_company(self, make_engine):
        prompts = random_prompts(12, seed=1)
        params = [SamplingParams(max_new_tokens=10, seed=i, ignore_eos=True, top_k=i * 20) for i in range(12)]
        alone = make_engine(max_seq_length=64, max_batch_size=1, max_step_tokens=7)
        together = make_engine(**TINY_CACHE)
        expected = [answer.token_ids for answer in alone.generate(prompts, params)]
        assert [answer.token_ids for answer in together.generate(prompts, params)] == expected

    def test_without_a_seed_answers_differ(self, make_engine):
        params = SamplingParams(max_new_tokens=8, temperature=5.0, top_k=0, top_p=1.0, ignore_eos=True)
        answers = make_engine().generate([[5]] * 4, params)
        assert len({answer.token_ids for answer in answers}) == 4

    def test_an_end_of_sequence_token_ends_the_answer_without_text(self, make_engine, tokenizer):
        eos = next(iter(tokenizer.eos_token_ids))
        prompt = next([token] for token in range(VOCAB_SIZE) if greedy_tokens([token], 1) == (eos,))
        engine = make_engine()
        (answer,) = engine.generate([prompt], SamplingParams(max_new_tokens=5, do_sample=False))
        assert (answer.token_ids, answer.text, answer.finish_reason) == ((eos,), "", FinishReason.STOP)
        (answer,) = engine.generate([prompt], SamplingParams(max_new_tokens=5, do_sample=False, ignore_eos=True))
        assert (len(answer.token_ids), answer.finish_reason) == (5, FinishReason.LENGTH)

    def test_a_stop_string_ends_the_answer_before_it(self, make_engine, tokenizer):
        prompt = [77, 78]
        text = tokenizer.decode(greedy_tokens(prompt, 12))
        stop = text[len(text) // 2 :][:3]
        params = SamplingParams(max_new_tokens=12, do_sample=False, ignore_eos=True, stop=(stop,))
        (answer,) = make_engine().generate([prompt], params)
        assert answer.text == text[: text.index(stop)]
        assert answer.finish_reason is FinishReason.STOP
        assert len(answer.token_ids) < 12

    def test_streamed_text_is_the_text_of_all_tokens(self, make_engine, tokenizer, submit):
        outputs = submit(make_engine(), [9, 8, 7])
        outputs.last()
        assert "".join(output.text for output in outputs.all) == tokenizer.decode(outputs.token_ids)
        assert [len(output.token_ids) for output in outputs.all] == [1] * 12

    def test_the_last_output_has_the_figures(self, make_engine, submit):
        outputs = submit(make_engine(), [9, 8, 7])
        usage = outputs.last().usage
        assert (usage.num_prompt_tokens, usage.num_new_tokens, usage.version) == (3, 12, 1)
        assert 0 <= usage.queue_seconds <= usage.first_token_seconds <= usage.total_seconds
        assert all(output.usage is None for output in outputs.all[:-1])

    def test_the_time_before_the_submission_counts_but_not_as_waiting(self, make_engine):
        observation = Observation(arrived_at=time.monotonic() - 1000)
        (answer,) = make_engine().generate([[9, 8, 7]], GREEDY, observation)
        usage = answer.usage
        assert usage.encoding_seconds >= 1000 and usage.queue_seconds < 1000
        assert usage.first_token_seconds >= usage.encoding_seconds + usage.queue_seconds

    def test_reasoning_that_is_long_enough_is_ended_and_the_answer_goes_on(self, make_engine):
        prompt, end_id = [9, 8, 7], 5
        (answer,) = make_engine().generate([prompt], replace(GREEDY, thinking=ThinkingLimit(4, end_id)))
        thought = greedy_tokens(prompt, 4)
        assert end_id not in thought
        assert answer.token_ids == (*thought, end_id, *greedy_tokens([*prompt, *thought, end_id], 7))

    def test_an_answer_ends_with_the_longest_sequence(self, make_engine):
        engine = make_engine(max_seq_length=20)
        (answer,) = engine.generate([[5] * 15], SamplingParams(max_new_tokens=500, ignore_eos=True))
        assert (len(answer.token_ids), answer.finish_reason) == (5, FinishReason.LENGTH)

    def test_the_model_limits_the_sequence_too(self, make_engine):
        decoder = FakeDecoder()
        decoder.spec.max_positions = 20
        with raises(PromptTooLongError, 20):
            make_engine(decoder, max_seq_length=200).generate([[5] * 20], GREEDY)

    def test_more_prompts_than_the_queue_holds_are_answered(self, make_engine):
        prompts = random_prompts(30, max_length=5)
        answers = make_engine(max_queue=3).generate(prompts, GREEDY)
        assert [answer.token_ids for answer in answers] == [greedy_tokens(prompt, 12) for prompt in prompts]

    @pytest.mark.parametrize("max_queue", [1, 2])
    def test_callers_that_share_the_queue_wait_for_each_other(self, make_engine, max_queue):
        engine, prompts = make_engine(max_queue=max_queue, max_batch_size=2), random_prompts(24, max_length=5)
        with ThreadPoolExecutor(3) as pool:
            parts = list(
                pool.map(lambda part: engine.generate(part, GREEDY), (prompts[start::3] for start in range(3)))
            )
        for start, answers in enumerate(parts):
            assert [answer.token_ids for answer in answers] == [greedy_tokens(p, 12) for p in prompts[start::3]]

    def test_what_is_submitted_between_steps_begins_in_one(self, make_engine):
        engine, order, done = make_engine(), [], threading.Semaphore(0)

        def on_output(output):
            order.append(output.request_id)
            if output.is_finished:
                done.release()

        with engine.between_steps():
            first = engine.submit([5], SamplingParams(max_new_tokens=3, ignore_eos=True), on_output)
            time.sleep(0.05)  # steps enough for the first to end, were it alone
            second = engine.submit([6], SamplingParams(max_new_tokens=3, ignore_eos=True), on_output)
        assert done.acquire(timeout=60) and done.acquire(timeout=60)
        assert order == [first, second] * 3

    def test_prompts_and_parameters_must_be_as_many(self, make_engine):
        with raises(RequestError, 2, 1):
            make_engine().generate([[5], [6]], [GREEDY])


class TestProposals:
    """Guesses save steps and change nothing: neither answers, nor what is counted and traced."""

    @pytest.fixture
    def guess(self):
        def propose(token_ids):
            """Four tokens, of which two or three are right."""
            first, second, third = greedy_tokens(token_ids, 3)
            return [first, second, third if len(token_ids) % 2 else 0, 7]

        return propose

    def test_greedy_answers_stay_as_they_are(self, make_engine, guess):
        prompts = random_prompts(40)
        for cache in ({}, TINY_CACHE):
            engine = make_engine(propose=guess, **cache)
            answers = engine.generate(prompts, GREEDY)
            assert [answer.token_ids for answer in answers] == [greedy_tokens(prompt, 12) for prompt in prompts]
            assert is_at_rest(engine)

    def test_they_save_steps(self, make_engine, guess):
        num_steps = []
        for propose in (None, guess):
            decoder, steps = FakeDecoder(), []
            decoder.on_step = steps.append
            make_engine(decoder, propose=propose).generate([[5]], GREEDY)
            num_steps.append(len(steps))
        assert num_steps[0] == 12
        assert num_steps[1] < 6

    def test_sampled_answers_stay_as_they_are(self, make_engine, guess):
        prompts = random_prompts(12, seed=1)
        params = [
            SamplingParams(
                max_new_tokens=10, seed=i, ignore_eos=True, top_k=3, repetition_penalty=1 + i / 10, logprobs=2
            )
            for i in range(12)
        ]
        plain, guessed = (make_engine(propose=propose).generate(prompts, params) for propose in (None, guess))
        for one, other in zip(plain, guessed, strict=True):
            assert (one.token_ids, one.text, one.logprobs) == (other.token_ids, other.text, other.logprobs)

    @pytest.mark.parametrize("end", ["length", "stop string", "end of sequence"])
    def test_what_did_not_come_true_is_neither_counted_nor_traced(self, make_engine, tokenizer, guess, end):
        prompts = [[token] for token in range(3, 60)]
        params = SamplingParams(max_new_tokens=12, do_sample=False, ignore_eos=True)
        if end == "stop string":
            params = replace(params, stop=("e", "t"))
        elif end == "end of sequence":
            eos = next(iter(tokenizer.eos_token_ids))
            endings = ([token] for token in range(VOCAB_SIZE) if eos in greedy_tokens([token], 3))
            prompts, params = [next(endings), next(endings)], replace(params, ignore_eos=False)
        tallies, answers = [], []
        for propose in (None, guess):
            tracker = ExpertTracker((0,), 8, 2, StatisticsSettings())
            engine = make_engine(observer=tracker, propose=propose)
            answers.append(engine.generate(prompts, params, Observation(wants_trace=True)))
            tallies.append(tracker.snapshot().tally)
        for one, other in zip(*answers, strict=True):
            assert one.token_ids == other.token_ids
            assert len(other.trace.expert_ids) == 1 + len(other.token_ids) - 1
            assert one.trace.expert_ids.tolist() == other.trace.expert_ids.tolist()
        assert tallies[0].counts.tolist() == tallies[1].counts.tolist()
        assert tallies[0].num_tokens.tolist() == tallies[1].num_tokens.tolist()
        assert tallies[0].num_requests == tallies[1].num_requests == len(prompts)

    @pytest.mark.parametrize(
        "propose",
        [lambda ids: None, lambda ids: 1 / 0, lambda ids: [VOCAB_SIZE], lambda ids: [-1], lambda ids: ["a"]],
        ids=["nothing", "an error", "beyond the vocabulary", "below it", "a text"],
    )
    def test_guesses_that_are_none_change_nothing(self, make_engine, propose):
        engine = make_engine(propose=propose)
        assert engine.generate([[5]], GREEDY)[0].token_ids == greedy_tokens([5], 12)
        assert is_at_rest(engine)

    @pytest.mark.parametrize("cache", [{"kv_cache_bytes": kv_cache_bytes(4)}, {"max_step_tokens": 3}])
    def test_nothing_is_guessed_that_the_step_has_no_room_for(self, make_engine, cache):
        class Costly(FunctionProposer):
            is_free = False

            def propose(self, wanted):
                self.num_computed += sum(wish.num_tokens for wish in wanted)
                return {wish.request.request_id: [0] * wish.num_tokens for wish in wanted}

        proposer = Costly(None)
        engine = make_engine(speculator=Speculator("costly", proposer, 8, VOCAB_SIZE), max_seq_length=16, **cache)
        params = replace(GREEDY, max_new_tokens=15)
        assert engine.generate([[5]], params)[0].token_ids == greedy_tokens([5], 15)
        assert 0 < engine.meter.read().speculation.num_proposed == proposer.num_computed

    def test_a_step_that_has_no_room_for_guesses_is_not_taken_for_one_that_looked(self, make_engine):
        class Counting(CostModel):
            num_trials = 0

            def add_trial(self, *figures):
                self.num_trials += 1

        costs = Counting()
        speculator = Speculator("function", FunctionProposer(lambda token_ids: ()), 8, VOCAB_SIZE, costs)
        engine = make_engine(speculator=speculator)
        assert engine.generate([[5]], GREEDY)[0].token_ids == greedy_tokens([5], 12)
        assert costs.num_trials == 11, "the last of 12 steps has no room"

    def test_callers_do_not_wait_for_a_guess(self, make_engine):
        is_guessing, may_go_on = threading.Event(), threading.Event()

        def propose(token_ids):
            is_guessing.set()
            assert may_go_on.wait(60)
            return ()

        engine, outputs = make_engine(propose=propose), Outputs()
        engine.submit([5], GREEDY, outputs)
        assert is_guessing.wait(60)
        assert engine.status().num_running == 1  # would wait for the guess if that held the condition
        engine.submit([6], GREEDY, Outputs())
        may_go_on.set()
        outputs.last()
        assert outputs.token_ids == greedy_tokens([5], 12)

    def test_a_step_gives_all_that_came_true_in_one_output(self, make_engine, guess, tokenizer):
        outputs = Outputs()
        make_engine(propose=guess).submit([9, 8, 7], replace(GREEDY, logprobs=0), outputs)
        outputs.last()
        assert outputs.token_ids == greedy_tokens([9, 8, 7], 12)
        assert max(len(output.token_ids) for output in outputs.all) > 2
        assert [len(output.logprobs) for output in outputs.all] == [len(output.token_ids) for output in outputs.all]
        assert "".join(output.text for output in outputs.all) == tokenizer.decode(outputs.token_ids)


class TestTextAfterAPrompt:
    """A tokenizer whose decoder takes a space from the beginning of a text, as SentencePiece's does."""

    @pytest.fixture
    def tokenizer(self):
        vocab = {f"▁w{index}" if index % 2 else f"<0x{index // 2 % 256:02X}>{index}" for index in range(VOCAB_SIZE)}
        vocab = dict.fromkeys(sorted(vocab))
        backend = Backend(models.WordLevel({piece: index for index, piece in enumerate(vocab)}, unk_token="▁w1"))
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        backend.add_special_tokens([piece for index, piece in enumerate(vocab) if index % 5 == 0])
        return Tokenizer(TokenizerParts(backend), frozenset())

    def expected(self, tokenizer, prompt, token_ids):
        return tokenizer.decode([*prompt, *token_ids])[len(tokenizer.decode(prompt)) :]

    def test_it_goes_on_whatever_is_preempted(self, make_engine, tokenizer, submit):
        prompts = random_prompts(40)
        answers = make_engine(**TINY_CACHE).generate(prompts, GREEDY)
        texts = [self.expected(tokenizer, prompt, greedy_tokens(prompt, 12)) for prompt in prompts]
        assert [answer.text for answer in answers] == texts
        assert any(text.startswith(" ") for text in texts)
        engine = make_engine()
        for prompt, text in zip(prompts[:10], texts, strict=False):
            outputs = submit(engine, prompt)
            outputs.last()
            assert "".join(output.text for output in outputs.all) == text

    def test_a_message_stands_by_itself(self, make_engine, tokenizer):
        prompts = random_prompts(40)
        params = SamplingParams(max_new_tokens=12, do_sample=False, continues_prompt=False)
        answers = make_engine().generate(prompts, params)
        assert [answer.text for answer in answers] == [tokenizer.decode(answer.token_ids) for answer in answers]

    def test_a_stop_string_at_the_first_token(self, make_engine, tokenizer):
        prompts = random_prompts(40)
        texts = [self.expected(tokenizer, prompt, greedy_tokens(prompt, 12)) for prompt in prompts]
        [prompt, text] = next(pair for pair in zip(prompts, texts, strict=True) if pair[1].startswith(" "))
        params = SamplingParams(max_new_tokens=12, do_sample=False, stop=text[:3])
        [answer] = make_engine().generate([prompt], params)
        assert (answer.text, answer.finish_reason) == ("", FinishReason.STOP)
        assert len(answer.token_ids) < 12

    def test_a_special_token_as_a_stop_string(self, make_engine, tokenizer):
        for prompt in random_prompts(40):
            token_ids = greedy_tokens(prompt, 12)
            place, special = next(
                ((i, token_id) for i, token_id in enumerate(token_ids) if token_id in tokenizer.special_tokens),
                (0, None),
            )
            if special is None:
                continue
            stop = tokenizer.special_tokens[special]
            params = SamplingParams(max_new_tokens=12, do_sample=False, stop=stop)
            [answer] = make_engine().generate([prompt], params)
            assert answer.token_ids == token_ids[: place + 1]
            assert answer.text == self.expected(tokenizer, prompt, token_ids[:place])
            assert answer.finish_reason is FinishReason.STOP


class TestLoad:
    def test_the_meter_knows_what_waited_and_ran_between_two_looks(self, make_engine, submit):
        engine = make_engine(starts=False, max_batch_size=2)
        submitted = [submit(engine, [5, 6, 7], GREEDY) for _ in range(5)]
        assert engine.meter.read().points[-1].waiting.peak == 5
        engine.start()
        for outputs in submitted:
            outputs.last()
        wait_until(lambda: is_at_rest(engine))
        points = engine.meter.read().points
        assert max(point.running.peak for point in points) == 2
        assert max(point.running.mean for point in points) > 0
        assert max(point.used_blocks.peak for point in points) >= 2
        assert sum(point.num_new_tokens for point in points) == 5 * GREEDY.max_new_tokens


class TestRefusals:
    def test_a_prompt_that_cannot_be_served(self, make_engine):
        engine = make_engine(max_seq_length=20)
        with raises(PromptTooLongError, 20):
            engine.submit([5] * 20, GREEDY, print)
        with raises(RequestError):
            engine.submit([], GREEDY, print)
        with raises(RequestError, 1, 8192):
            engine.submit([5, VOCAB_SIZE], GREEDY, print)
        assert is_at_rest(engine)

    def test_a_full_queue(self, make_engine, submit):
        engine = make_engine(starts=False, max_queue=1, max_batch_size=1)
        outputs = [submit(engine, [5]), submit(engine, [6])]
        with pytest.raises(OverloadedError):
            submit(engine, [7])
        engine.start()
        assert {output.last().finish_reason for output in outputs} == {FinishReason.LENGTH}


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


class TestFailures:
    def failing_decoder(self, error=None):
        decoder = FakeDecoder()

        def on_step(token_ids):
            if 666 in token_ids:
                raise error or RuntimeError("the kernel broke")

        decoder.on_step = on_step
        return decoder

    def test_a_step_that_fails_ends_its_requests_and_no_others(self, make_engine, submit):
        decoder = self.failing_decoder()
        engine = make_engine(decoder, max_step_tokens=4, max_batch_size=1)
        decoder.gate.clear()
        failing, waiting = submit(engine, [5, 666, 5, 5]), submit(engine, [6])
        decoder.gate.set()
        last = failing.last()
        assert last.finish_reason is FinishReason.ERROR
        assert str(last.error) == "the kernel broke"
        waiting.last()
        assert waiting.token_ids == greedy_tokens([6], 12)
        assert engine.status().is_alive
        wait_until(lambda: is_at_rest(engine))

    def test_failures_with_successes_between_do_not_end_the_engine(self, make_engine):
        engine = make_engine(self.failing_decoder())
        for _ in range(4):
            assert engine.generate([[666]], GREEDY)[0].finish_reason is FinishReason.ERROR
            assert engine.generate([[6]], GREEDY)[0].token_ids == greedy_tokens([6], 12)

    @pytest.mark.parametrize(("error", "num_steps"), [(None, 3), (MemoryError("no memory"), 1)])
    def test_failures_in_a_row_or_lack_of_memory_end_it(self, make_engine, submit, error, num_steps):
        failure = "MemoryError" if error else "RuntimeError"
        engine = make_engine(self.failing_decoder(error), starts=False, max_batch_size=1)
        failing = [submit(engine, [666]) for _ in range(num_steps)]
        waiting = [submit(engine, [6]) for _ in range(3)]
        engine.start()
        for outputs in failing:
            assert not isinstance(outputs.last().error, UnavailableError)
        for outputs in waiting:
            ended = outputs.last().error
            assert isinstance(ended, UnavailableError) and is_named(failure, str(ended))
        wait_until(lambda: not engine.status().is_alive)
        assert is_at_rest(engine)
        with raises(UnavailableError, failure):
            submit(engine, [6])

    def test_an_error_of_the_loop_itself_answers_everyone(self, make_engine, submit, monkeypatch):
        engine = make_engine(starts=False)
        outputs = [submit(engine, [5]), submit(engine, [6])]
        monkeypatch.setattr(Scheduler, "schedule", lambda scheduler: 1 / 0)
        engine.start()
        assert all(isinstance(output.last().error, UnavailableError) for output in outputs)
        wait_until(lambda: not engine.status().is_alive)

    def test_logits_that_are_not_finite_end_their_request_only(self, make_engine, submit):
        decoder = FakeDecoder()
        decoder.nan_token = 666
        engine = make_engine(decoder, starts=False)
        bad, good = submit(engine, [5, 666]), submit(engine, [6])
        engine.start()
        assert bad.last().finish_reason is FinishReason.ERROR
        assert is_named("NaN", str(bad.last().error))
        good.last()
        assert good.token_ids == greedy_tokens([6], 12)
        wait_until(lambda: is_at_rest(engine))

    def test_a_callback_that_raises_ends_its_request_only(self, make_engine, submit):
        engine = make_engine(starts=False)
        num_calls = 0

        def broken(output):
            nonlocal num_calls
            num_calls += 1
            raise ValueError("nobody listens")

        engine.submit([5], GREEDY, broken)
        good = submit(engine, [6])
        engine.start()
        good.last()
        assert good.token_ids == greedy_tokens([6], 12)
        wait_until(lambda: is_at_rest(engine))
        assert num_calls == 2  # the first output, and that it was cancelled


class TestVersions:
    def test_each_answer_is_that_of_exactly_one_version(self, make_engine, submit):
        decoder = FakeDecoder()
        engine = make_engine(decoder, **TINY_CACHE)
        prompts = random_prompts(60, seed=3)
        outputs = []
        for index, prompt in enumerate(prompts):
            if index % 20 == 19:
                wait_until(lambda: outputs[-10].all)  # it came after the last change, so that each version has requests
                engine.set_version(FakeVersion(engine.version.version_id + 1))
            outputs.append(submit(engine, prompt))
        versions = [output.last().usage.version for output in outputs]
        for prompt, output, version in zip(prompts, outputs, versions, strict=True):
            assert output.token_ids == greedy_tokens(prompt, 12, version)
        assert set(versions) == {1, 2, 3, 4}
        wait_until(lambda: is_at_rest(engine))

    def test_requests_in_flight_finish_on_theirs_and_new_ones_start_on_the_newest(self, make_engine, submit):
        engine, decoder = held_engine(make_engine)
        old = submit(engine, [5])
        wait_until(lambda: engine.status().num_running == 1)
        engine.set_version(FakeVersion(2))
        new = submit(engine, [5])
        assert engine.status().versions == {1: 1, 2: 0}
        decoder.gate.set()
        assert (old.last().usage.version, new.last().usage.version) == (1, 2)
        assert old.token_ids == greedy_tokens([5], 12, version_id=1)
        assert new.token_ids == greedy_tokens([5], 12, version_id=2)
        assert engine.status().versions == {2: 0}

    @pytest.mark.parametrize("propose", [None, lambda token_ids: greedy_tokens(token_ids, 3)], ids=["", "guessing"])
    def test_requests_of_several_versions_together_get_each_its_own_answer(self, make_engine, propose):
        """They preempt one another, and have beginnings in common, which versions do not share; guesses are of one."""
        engine = make_engine(FakeDecoder(), propose=propose, **TINY_CACHE)
        versions = [engine.version, FakeVersion(2), FakeVersion(3)]
        engine.keep({2, 3})
        prompts = [[*range(1, 20), index // 3] for index in range(30)]
        outputs = [Outputs() for _ in prompts]
        left = []
        engine.on_left = left.append
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            engine.submit(prompt, GREEDY, output, version=versions[index % 3])
        for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            assert output.last().usage.version == index % 3 + 1
            assert output.token_ids == greedy_tokens(prompt, 12, index % 3 + 1)
        assert any(output.last().usage.num_cached_tokens for output in outputs)
        wait_until(lambda: engine.status().versions == {1: 0, 2: 0, 3: 0})
        wait_until(lambda: set(left) == {1, 2, 3})

    def test_what_a_kept_version_has_computed_of_a_beginning_stays_shared(self, make_engine, submit):
        engine = make_engine(FakeDecoder(), block_size=4)
        kept, prompt = engine.version, list(range(1, 20))

        def cached_tokens():
            output = Outputs()
            engine.submit(prompt, GREEDY, output, version=kept)
            return output.last().usage.num_cached_tokens

        assert cached_tokens() == 0
        engine.keep({1})
        engine.set_version(FakeVersion(2))
        submit(engine, prompt).last()
        assert cached_tokens() == 16
        engine.keep(set())
        assert cached_tokens() == 0

    def test_an_old_version_is_let_go_with_its_last_request(self, make_engine):
        decoder = FakeDecoder()
        engine = make_engine(decoder, version=(version := FakeVersion(1)))
        old = weakref.ref(version)
        released = queue.SimpleQueue()
        decoder.gate.clear()
        engine.submit([5], GREEDY, lambda output: output.is_finished and released.put(old()))
        wait_until(lambda: engine.status().num_running == 1)
        engine.set_version(FakeVersion(2))
        del version
        gc.disable()
        try:
            decoder.gate.set()
            assert released.get(timeout=60) is None  # gone even before the last output arrives
        finally:
            gc.enable()

    def test_an_old_version_is_let_go_when_its_last_step_fails(self, make_engine, submit, monkeypatch):
        monkeypatch.setattr(logging.getLogger("amalgam.engine"), "disabled", True)  # pytest keeps what is logged
        decoder = FakeDecoder()
        engine = make_engine(decoder, version=(version := FakeVersion(1)))
        old = weakref.ref(version)
        decoder.on_step = lambda token_ids: 1 / 0
        decoder.gate.clear()
        outputs = submit(engine, [5])
        wait_until(lambda: engine.status().num_running == 1)
        engine.set_version(FakeVersion(2))
        del version
        decoder.gate.set()
        assert isinstance(outputs.last().error, ZeroDivisionError)
        gc.collect()
        wait_until(lambda: old() is None)


class TestEnd:
    def test_drain_refuses_new_requests_and_waits_for_the_others(self, make_engine, submit):
        engine, decoder = held_engine(make_engine)
        outputs = submit(engine, [5])
        assert not engine.drain(timeout_seconds=0.01)
        assert engine.status().is_draining
        with raises(UnavailableError):
            submit(engine, [6])
        decoder.gate.set()
        assert engine.drain(timeout_seconds=60)
        assert outputs.last().finish_reason is FinishReason.LENGTH
        assert engine.status().is_alive

    def test_stop_answers_everyone(self, make_engine, submit):
        engine, decoder = held_engine(make_engine, max_batch_size=1)
        outputs = [submit(engine, [5]), submit(engine, [6])]
        wait_until(lambda: engine.status().num_running == 1)

        def open_gate():
            wait_until(lambda: not engine.status().is_alive)  # `stop` has begun
            decoder.gate.set()

        opener = threading.Thread(target=open_gate)
        opener.start()
        engine.stop()
        opener.join()
        for output in outputs:
            assert output.last().finish_reason is FinishReason.ERROR
            assert isinstance(output.last().error, UnavailableError)
            assert output.last().usage is not None
        assert is_at_rest(engine)
        assert not engine.status().is_alive
        with raises(UnavailableError):
            submit(engine, [6])
        engine.stop()

    def test_stop_before_start_answers_too(self, make_engine, submit):
        engine = make_engine(starts=False)
        outputs = submit(engine, [5])
        assert not engine.status().is_alive
        engine.stop()
        assert isinstance(outputs.last().error, UnavailableError)

    def test_a_callback_may_stop_the_engine(self, make_engine):
        engine = make_engine()
        engine.submit([5], GREEDY, lambda output: engine.stop())
        wait_until(lambda: not engine.status().is_alive)


class RecordingObserver:
    def __init__(self):
        self.num_requests = 0
        self.num_prompt = self.num_generated = 0
        self._spans = None

    def begin_step(self, spans):
        self._spans = spans
        self._rows = 0

    def observe(self, layer_id, expert_ids, gate_weights):
        self._rows = len(expert_ids)

    def end_step(self, rejected):
        assert self._spans[-1].stop == self._rows
        for span in self._spans:
            first_generated = max(span.record_from, span.generated_from)
            self.num_prompt += max(0, min(span.generated_from, span.stop) - span.record_from)
            self.num_generated += span.stop - first_generated

    def count_request(self, label):
        self.num_requests += 1

    def distinct_experts(self):
        return None


def test_the_observer_sees_every_token_once_whatever_is_preempted(make_engine):
    observer = RecordingObserver()
    prompts = random_prompts(40, seed=5)
    num_steps = []
    decoder = FakeDecoder()
    decoder.on_step = lambda token_ids: num_steps.append(len(token_ids))
    make_engine(decoder, observer=observer, **TINY_CACHE).generate(prompts, GREEDY)
    num_prompt = sum(map(len, prompts))
    num_generated = 40 * 11  # the token sampled last never runs through the model
    assert sum(num_steps) > num_prompt + num_generated, "nothing was preempted, so this test shows nothing"
    assert (observer.num_requests, observer.num_prompt, observer.num_generated) == (40, num_prompt, num_generated)


def test_what_a_step_gave_before_its_end_failed_is_delivered_and_counted(make_engine, submit):
    class Failing(RecordingObserver):
        def end_step(self, rejected):
            if self._spans[0].position:
                raise ValueError("no room for counts")

    engine = make_engine(observer=Failing())
    outputs = submit(engine, [5])
    last = outputs.last()
    assert isinstance(last.error, ValueError) and last.finish_reason is FinishReason.ERROR
    assert outputs.token_ids == greedy_tokens([5], 2) and last.usage.num_new_tokens == 2
    assert engine.meter.read().num_new_tokens == 2
    assert is_at_rest(engine)


class TestEnds:
    def test_a_stop_token_ends_without_text(self, make_engine, tokenizer):
        expected = greedy_tokens([5], 12)
        params = replace(GREEDY, stop_token_ids=(expected[4],))
        [answer] = make_engine().generate([[5]], params)
        place = expected.index(expected[4])
        assert answer.token_ids == expected[: place + 1]
        assert (answer.finish_reason, answer.stopped_by) == (FinishReason.STOP, expected[4])
        [before] = make_engine().generate([[5]], replace(GREEDY, max_new_tokens=place))
        assert answer.text == before.text

    def test_a_stop_string_is_named(self, make_engine):
        [whole] = make_engine().generate([[5]], GREEDY)
        stop = whole.text[8:11]
        [answer] = make_engine().generate([[5]], replace(GREEDY, stop=("never there", stop)))
        assert (answer.text, answer.stopped_by) == (whole.text[: whole.text.index(stop)], stop)

    def test_nothing_ends_before_the_least_number(self, make_engine, tokenizer):
        [whole] = make_engine().generate([[5]], GREEDY)
        early = replace(GREEDY, stop=(whole.text[1:3],), min_tokens=12)
        [answer] = make_engine().generate([[5]], early)
        assert (answer.text, answer.finish_reason) == (whole.text, FinishReason.LENGTH)
        expected = greedy_tokens([5], 12)
        params = replace(GREEDY, stop_token_ids=(expected[3],), min_tokens=6)
        [answer] = make_engine().generate([[5]], params)
        assert expected[3] not in answer.token_ids[:5]
        assert answer.token_ids[:3] == expected[:3]

    def test_tokens_that_the_model_does_not_have_are_refused(self, make_engine):
        engine = make_engine()
        with raises(RequestError, "logit_bias", VOCAB_SIZE, VOCAB_SIZE - 1):
            engine.generate([[1]], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}))
        with raises(RequestError, "stop_token_ids", VOCAB_SIZE):
            engine.generate([[1]], SamplingParams(stop_token_ids=(VOCAB_SIZE,)))
