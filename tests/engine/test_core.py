"""The whole engine over a decoder that notices every wrong block, version and order."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from amalgam.engine.params import SamplingParams, ThinkingLimit
from amalgam.engine.request import FinishReason, Observation
from amalgam.errors import OverloadedError, PromptTooLongError, RequestError, UnavailableError
from amalgam.text.parts import TokenizerParts
from amalgam.text.tokenizer import Tokenizer
from tests.engine.fakes import (
    VOCAB_SIZE,
    FakeDecoder,
    greedy_tokens,
)
from tests.engine.running import GREEDY, TINY_CACHE, held_engine, is_at_rest, random_prompts, wait_until
from tests.errors import raises


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
        error = outputs.last().error
        assert isinstance(error, UnavailableError)
        assert "another server" in error.remedy, "nothing has gone wrong here that a log could tell"

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
