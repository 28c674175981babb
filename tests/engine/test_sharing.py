"""Requests that begin alike, and prompts beside streams."""

from dataclasses import replace

from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.meter import Counts
from amalgam.engine.request import Observation
from amalgam.engine.sampler import NonFiniteLogitsError
from amalgam.experts.tracker import ExpertTracker
from tests.engine.fakes import FakeDecoder, FakeVersion, greedy_tokens
from tests.engine.running import GREEDY, is_at_rest


class TestPace:
    def test_a_long_prompt_takes_small_portions_beside_streams_and_large_ones_alone(self, make_engine, submit):
        decoder, steps = FakeDecoder(), []
        engine = make_engine(decoder, max_step_tokens=256, max_slowdown=1.0000001)
        decoder.on_step = lambda token_ids: steps.append(len(token_ids))
        submit(engine, [5] * 200).last()
        assert steps[0] == 200
        steps.clear()
        submitted = []

        def on_step(token_ids):
            steps.append(len(token_ids))
            if len(steps) == 5:
                submitted.append(submit(engine, list(range(200))))

        decoder.on_step = on_step
        with engine.between_steps():
            streams = [submit(engine, [token], replace(GREEDY, max_new_tokens=40)) for token in range(10, 14)]
        for outputs in streams:
            outputs.last()
        [long] = submitted
        long.last()
        assert long.token_ids == greedy_tokens(range(200), 12)
        assert max(steps) == 4 + 32


class TestSharedBeginnings:
    def test_usage_and_statistics_tell_what_was_not_computed(self, make_engine):
        tracker = ExpertTracker((0,), 8, 2, StatisticsSettings())
        engine, prompt = make_engine(observer=tracker), list(range(10, 40))
        [first], [second] = engine.generate([prompt], GREEDY), engine.generate([prompt], GREEDY)
        assert (first.usage.num_cached_tokens, second.usage.num_cached_tokens) == (0, 28)
        assert first.token_ids == second.token_ids == greedy_tokens(prompt, 12)
        tally = tracker.snapshot().tally
        assert tally.num_tokens.sum() == 2 * (30 + 11) - 28
        assert tally.num_requests == 2
        reading = engine.meter.read()
        assert reading.counts == Counts(0, 60, 28) and reading.num_prompt_tokens == 60 - 28

    def test_a_trace_and_log_probabilities_of_the_prompt_need_all_of_it(self, make_engine):
        tracker = ExpertTracker((0,), 8, 2, StatisticsSettings())
        engine, prompt = make_engine(observer=tracker), list(range(10, 40))
        engine.generate([prompt], GREEDY)
        [traced] = engine.generate([prompt], GREEDY, Observation(wants_trace=True))
        assert traced.usage.num_cached_tokens == 0
        assert (traced.trace.expert_ids >= 0).all() and len(traced.trace.expert_ids) == 30 + 11
        [scored] = engine.generate([prompt], replace(GREEDY, prompt_logprobs=1))
        assert scored.usage.num_cached_tokens == 0

    def test_nothing_of_an_old_version_is_found(self, make_engine):
        engine, prompt = make_engine(), list(range(10, 40))
        engine.generate([prompt], GREEDY)
        engine.set_version(FakeVersion(2))
        [answer] = engine.generate([prompt], GREEDY)
        assert (answer.usage.num_cached_tokens, answer.token_ids) == (0, greedy_tokens(prompt, 12, 2))

    def test_it_can_be_switched_off(self, make_engine):
        engine, prompt = make_engine(prefix_cache=False), list(range(10, 40))
        answers = [engine.generate([prompt], GREEDY)[0] for _ in range(2)]
        assert [answer.usage.num_cached_tokens for answer in answers] == [0, 0]

    def test_a_step_that_fails_leaves_nothing_to_be_found(self, make_engine):
        decoder, prompt = FakeDecoder(), list(range(10, 40))
        engine = make_engine(decoder)

        def fail(token_ids):
            raise ValueError("no luck")

        decoder.on_step = fail
        [failed] = engine.generate([prompt], GREEDY)
        decoder.on_step = lambda token_ids: None
        [answer] = engine.generate([prompt], GREEDY)
        assert isinstance(failed.error, ValueError)
        assert (answer.usage.num_cached_tokens, answer.token_ids) == (0, greedy_tokens(prompt, 12))
        assert is_at_rest(engine)

    def test_what_is_not_finite_is_not_to_be_found(self, make_engine):
        decoder, prompt = FakeDecoder(), list(range(10, 40))
        decoder.nan_token = 666
        engine = make_engine(decoder)
        [failed], [answer] = engine.generate([[*prompt, 666]], GREEDY), engine.generate([prompt], GREEDY)
        assert isinstance(failed.error, NonFiniteLogitsError)
        assert (answer.usage.num_cached_tokens, answer.token_ids) == (0, greedy_tokens(prompt, 12))
        assert is_at_rest(engine)
