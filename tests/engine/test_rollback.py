"""A weight version that fails on its first requests is left for the one before, and they notice as little as can be."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest

from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.params import SamplingParams
from amalgam.engine.probation import Probation, WeightsFailedError
from amalgam.engine.request import FinishReason, Observation
from amalgam.engine.sampler import NonFiniteLogitsError
from amalgam.experts.tracker import ExpertTracker
from tests.engine.fakes import FakeDecoder, FakeVersion, greedy_tokens
from tests.engine.running import GREEDY, Failing, Outputs, is_at_rest, random_prompts, wait_until
from tests.errors import is_named


class FailingDecoder(FakeDecoder):
    """Computes NaN, or raises, where a version is at fault from its step `after` on."""

    def __init__(self, bad=(2,), error=None, after=0):
        super().__init__()
        self.bad, self.error, self.after, self.num_steps = bad, error, after, 0

    def forward(self, context, weights):
        is_bad = weights.version_id in self.bad
        self.num_steps += is_bad
        if not is_bad or self.num_steps <= self.after:
            return super().forward(context, weights)
        if self.error is not None:
            raise self.error
        logits = super().forward(context, weights)
        self.hidden[:, 1] = 1
        return logits.fill_(float("nan"))


@pytest.fixture
def held(make_engine, submit):
    """An engine with prompts in its queue, on version 2, before its first step; and what it told of left versions."""

    def make(decoder, prompts, version=None, **settings):
        engine = make_engine(decoder, starts=False, **{"rollback_answers": 8} | settings)
        told = []
        engine.on_version_failed = told.append
        engine.set_version(version or FakeVersion(2))
        return engine, [submit(engine, prompt) for prompt in prompts], told

    return make


@pytest.mark.parametrize("error", [None, RuntimeError("the kernel broke"), MemoryError("no memory")])
def test_requests_that_had_sent_nothing_run_again_on_the_version_before(held, submit, error):
    prompts = random_prompts(8, max_length=40)
    engine, outputs, told = held(FailingDecoder(error=error), prompts)
    engine.start()
    for prompt, output in zip(prompts, outputs, strict=True):
        assert (output.last().error, output.last().usage.version) == (None, 1)
        assert output.token_ids == greedy_tokens(prompt, 12, 1)
    (left,) = told
    assert (left.version.version_id, left.instead.version_id, left.num_ended) == (2, 1, 0)
    assert left.num_restarted > 0 and (str(error) if error else "NaN") in left.reason
    assert engine.version.version_id == 1
    wait_until(lambda: is_at_rest(engine))


@pytest.mark.parametrize("error", [None, RuntimeError("the kernel broke")])
def test_requests_run_again_though_nobody_takes_the_news(held, submit, error):
    engine, (output,), _ = held(FailingDecoder(error=error), [[5]])
    engine.on_version_failed = observer = Failing(RuntimeError("can't start new thread"))
    engine.start()
    assert (output.last().error, output.last().usage.version) == (None, 1)
    assert submit(engine, [6]).last().error is None
    assert (observer.num_calls, engine.version.version_id) == (1, 1)


def test_those_that_had_begun_to_answer_end_with_an_error_that_says_so(held):
    engine, (begun, waiting), told = held(FailingDecoder(after=1), [[5], [6]], max_batch_size=1)
    engine.start()
    last = begun.last()
    assert (last.finish_reason, last.usage.version) == (FinishReason.ERROR, 2)
    assert begun.token_ids == greedy_tokens([5], 1, 2)
    assert isinstance(last.error, WeightsFailedError)
    assert is_named("version 2", str(last.error)) and is_named("version 1", str(last.error))
    assert waiting.last().error is None
    assert waiting.token_ids == greedy_tokens([6], 12, 1)
    assert (told[0].num_restarted, told[0].num_ended) == (0, 1)


def test_a_version_that_was_chosen_before_it_failed_is_not_run_on(held, submit):
    version = FakeVersion(2)
    engine, (output,), _ = held(FailingDecoder(), [[5]], version)
    engine.start()
    output.last()
    late, asking = Outputs(), Outputs()
    engine.submit([6], GREEDY, late, Observation(may_move=True), version=version)
    engine.submit([6], GREEDY, asking, version=version)
    assert (late.last().error, late.last().usage.version) == (None, 1)
    assert isinstance(asking.last().error, NonFiniteLogitsError)


def test_a_request_that_asked_for_a_version_is_not_moved_to_another(make_engine):
    engine = make_engine(FailingDecoder(), starts=False, rollback_answers=8)
    engine.set_version(version := FakeVersion(2))
    asking, chosen = Outputs(), Outputs()
    engine.submit([5], GREEDY, asking, version=version)
    engine.submit([6], GREEDY, chosen, Observation(may_move=True), version=version)
    engine.start()
    assert isinstance(asking.last().error, WeightsFailedError)
    assert (chosen.last().error, chosen.token_ids) == (None, greedy_tokens([6], 12, 1))


def test_a_prompt_half_computed_begins_anew_with_all_that_is_read_of_it(make_engine):
    prompt, wanted = random_prompts(1, max_length=50, seed=4)[0] * 2, replace(GREEDY, prompt_logprobs=1)
    sound = make_engine(max_step_tokens=8).generate([prompt], wanted)[0]
    engine = make_engine(FailingDecoder(after=2), starts=False, max_step_tokens=8, rollback_answers=8)
    engine.set_version(FakeVersion(2))
    outputs = Outputs()
    engine.submit(prompt, wanted, outputs)
    engine.start()
    outputs.last()
    assert outputs.token_ids == sound.token_ids
    assert outputs.all[0].prompt_logprobs == sound.prompt_logprobs


def test_a_request_whose_experts_were_traced_on_both_is_not_run_again(make_engine, submit):
    tracker = ExpertTracker((0,), 8, 2, StatisticsSettings())
    engine = make_engine(FailingDecoder(after=1), observer=tracker, starts=False, max_step_tokens=8, rollback_answers=8)
    engine.set_version(FakeVersion(2))
    traced = Outputs()
    engine.submit([5] * 20, GREEDY, traced, Observation(wants_trace=True))
    engine.start()
    assert isinstance(traced.last().error, WeightsFailedError)
    wait_until(lambda: is_at_rest(engine))


def test_an_error_after_enough_answers_is_the_requests_own(make_engine, submit):
    decoder = FakeDecoder()
    decoder.nan_token = 666
    engine = make_engine(decoder, rollback_answers=2)
    engine.set_version(FakeVersion(2))
    engine.generate([[5], [6]], GREEDY)
    assert isinstance(submit(engine, [666]).last().error, NonFiniteLogitsError)
    assert engine.version.version_id == 2


@pytest.mark.parametrize("kind", ["moves", "asked for", "read", "guessed"])
def test_a_prompt_that_no_version_bears_hurts_nobody_else(make_engine, submit, kind):
    decoder = FakeDecoder()
    decoder.nan_token = 666
    guesses = {"propose": lambda token_ids: [9, 666]} if kind == "guessed" else {}
    engine = make_engine(decoder, starts=False, rollback_answers=8, max_step_tokens=16, **guesses)
    told = []
    engine.on_version_failed = told.append
    engine.set_version(version := FakeVersion(2))
    prompts = [[5], [6] * 20, [7]]
    others = [submit(engine, prompt) for prompt in prompts]
    hostile = Outputs()
    params = replace(GREEDY, prompt_logprobs=1) if kind == "read" else GREEDY
    engine.submit([8] * 20 + [666], params, hostile, version=version if kind == "asked for" else None)
    engine.start()
    assert isinstance(hostile.last().error, NonFiniteLogitsError)
    assert (hostile.last().usage.version, hostile.token_ids) == (2, ())
    for prompt, output in zip(prompts, others, strict=True):
        assert (output.last().error, output.token_ids) == (None, greedy_tokens(prompt, 12, 2))
    assert (engine.version.version_id, told) == (2, [])
    wait_until(lambda: is_at_rest(engine))


def test_an_answer_that_no_version_goes_on_with_is_its_own_fault(make_engine, submit):
    decoder = FakeDecoder()
    decoder.nan_token = greedy_tokens([5], 4, 2)[3]
    engine = make_engine(decoder, starts=False, rollback_answers=8)
    engine.set_version(version := FakeVersion(2))
    began = submit(engine, [5])
    engine.start()
    assert isinstance(began.last().error, NonFiniteLogitsError)
    assert (began.last().usage.version, began.token_ids) == (2, greedy_tokens([5], 4, 2))
    assert engine.version.version_id == 2
    old = weakref.ref(version)
    engine.set_version(FakeVersion(3))
    del version
    wait_until(lambda: gc.collect() >= 0 and old() is None)


def test_who_cancels_while_another_version_computes_it_again_is_told_the_one_that_answered(make_engine, submit):
    decoder = FakeDecoder()
    decoder.nan_token = greedy_tokens([5], 4, 2)[3]
    engine = make_engine(decoder, starts=False, rollback_answers=8)
    engine.set_version(FakeVersion(2))
    began = Outputs()
    request_id = engine.submit([5], GREEDY, began)
    decoder.on_step = lambda token_ids: engine.cancel(request_id) if len(token_ids) == 5 else None
    engine.start()
    assert (began.last().finish_reason, began.last().usage.version) == (FinishReason.CANCELLED, 2)
    assert began.token_ids == greedy_tokens([5], 4, 2)
    wait_until(lambda: is_at_rest(engine))


def test_no_prompt_goes_round_between_versions_that_are_both_on_probation(make_engine, submit):
    decoder = FakeDecoder()
    decoder.nan_token = 666
    engine = make_engine(decoder, rollback_answers=8)
    engine.set_version(FakeVersion(2))
    engine.generate([[5]], GREEDY)
    engine.set_version(FakeVersion(3))  # which 2 would be gone back to from
    hostile = submit(engine, [666])
    assert isinstance(hostile.last().error, NonFiniteLogitsError)
    assert engine.version.version_id == 3
    wait_until(lambda: is_at_rest(engine))


def test_a_prompt_for_a_vector_that_no_version_bears_is_its_own_fault(make_engine):
    decoder = FakeDecoder()
    decoder.head = lambda hidden: FakeDecoder.head(decoder, hidden.nan_to_num())
    decoder.compile = lambda weights: SimpleNamespace(
        describe=dict, hidden=lambda: decoder.hidden * float("nan"), head=decoder.head
    )
    engine = make_engine(decoder, rollback_answers=8)
    engine.set_version(FakeVersion(2))
    with pytest.raises(NonFiniteLogitsError):
        engine.embed_all([[5, 6]])
    assert engine.version.version_id == 2
    wait_until(lambda: is_at_rest(engine))


def test_of_several_on_probation_that_one_is_left_for_which_another_answers(make_engine):
    engine = make_engine(FailingDecoder(bad=(2, 3)), starts=False, rollback_answers=8)
    told = []
    engine.on_version_failed = told.append
    engine.set_version(FakeVersion(2))
    engine.watch(candidate := FakeVersion(3))
    output = Outputs()
    engine.submit([5], GREEDY, output, Observation(may_move=True), version=candidate)
    engine.start()
    assert (output.last().error, output.token_ids) == (None, greedy_tokens([5], 12, 1))
    assert [(left.version.version_id, left.num_restarted) for left in told] == [(2, 1)]
    engine.submit([6], GREEDY, later := Outputs(), Observation(may_move=True), version=candidate)
    assert (later.last().error, later.token_ids) == (None, greedy_tokens([6], 12, 1))
    assert [left.version.version_id for left in told] == [2, 3]


def test_where_it_is_not_wanted_nothing_is_left(held):
    engine, (output,), told = held(FailingDecoder(), [[5]], rollback_answers=0)
    engine.start()
    assert isinstance(output.last().error, NonFiniteLogitsError)
    assert (engine.version.version_id, told) == (2, [])


def test_the_version_before_is_let_go_when_the_new_one_has_shown_itself(make_engine):
    engine = make_engine(version=(version := FakeVersion(1)), rollback_answers=3)
    old = weakref.ref(version)
    del version
    engine.set_version(FakeVersion(2))
    engine.generate([[5], [6]], GREEDY)
    gc.collect()
    assert old() is not None
    engine.generate([[7]], SamplingParams(max_new_tokens=1))
    gc.collect()
    assert old() is None


def test_versions_that_have_answered_nothing_are_not_gone_back_to(make_engine, submit):
    engine = make_engine(FailingDecoder(bad=(2, 3)), starts=False, rollback_answers=8)
    engine.set_version(FakeVersion(2))
    engine.set_version(FakeVersion(3))
    output = submit(engine, [5])
    engine.start()
    assert (output.last().error, output.last().usage.version) == (None, 1)


class TestProbation:
    def test_the_newest_that_has_answered_is_gone_back_to(self):
        first, second, third = (FakeVersion(number) for number in (1, 2, 3))
        probation = Probation(4, first)
        assert not probation.is_on_probation(first, first)
        probation.replace(first, second)
        probation.succeed(second, second)
        probation.replace(second, third)
        assert probation.fallback is second
        assert probation.fail(third, third) is second
        assert not probation.is_on_probation(second, second)  # nothing is left to go back to

    def test_a_return_to_a_version_that_is_trusted_keeps_no_other(self):
        first, second = FakeVersion(1), FakeVersion(2)
        probation = Probation(4, first)
        probation.replace(first, second)
        probation.succeed(second, second)
        probation.replace(second, first)
        assert probation.fallback is None

    def test_a_candidate_is_watched_for_as_long_as_it_is_one(self):
        first, candidate = FakeVersion(1), FakeVersion(2)
        probation = Probation(2, first)
        probation.watch(candidate)
        for _ in range(5):
            probation.succeed(candidate, first)
        assert probation.is_on_probation(candidate, first)
        assert probation.fail(candidate, first) is first
        assert not probation.is_on_probation(candidate, first)

    def test_what_is_tried_no_more_is_not_watched(self):
        first, candidate = FakeVersion(1), FakeVersion(2)
        probation = Probation(2, first)
        probation.watch(candidate)
        probation.forget(candidate)
        assert not probation.is_on_probation(candidate, first)

    def test_a_candidate_that_has_answered_enough_is_trusted_when_it_is_taken(self):
        first, candidate = FakeVersion(1), FakeVersion(2)
        probation = Probation(2, first)
        probation.watch(candidate)
        for _ in range(2):
            probation.succeed(candidate, first)
        probation.replace(first, candidate)
        assert probation.fallback is None
        assert not probation.is_on_probation(candidate, candidate)
