"""Guesses of tokens, over a decoder that notices every wrong block."""

import threading
from dataclasses import replace

import pytest

from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Observation
from amalgam.engine.speculation.costs import CostModel
from amalgam.engine.speculation.speculator import Speculator
from amalgam.experts.tracker import ExpertTracker
from tests.engine.fakes import (
    VOCAB_SIZE,
    FakeDecoder,
    FunctionProposer,
    greedy_tokens,
    kv_cache_bytes,
)
from tests.engine.running import GREEDY, TINY_CACHE, Outputs, is_at_rest, random_prompts


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
