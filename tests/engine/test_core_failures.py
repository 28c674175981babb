"""Steps that fail: who is told, and what goes on."""

import pytest

from amalgam.config.statistics import StatisticsSettings
from amalgam.engine.meter import Meter
from amalgam.engine.request import FinishReason, Observation
from amalgam.engine.scheduler import Scheduler
from amalgam.errors import UnavailableError
from amalgam.experts.tracker import ExpertTracker
from tests.engine.fakes import (
    FakeDecoder,
    greedy_tokens,
)
from tests.engine.running import GREEDY, Failing, Outputs, is_at_rest, wait_until
from tests.errors import is_named, raises


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

    def test_an_error_between_two_last_outputs_tells_nobody_twice(self, make_engine, submit, monkeypatch):
        engine = make_engine(starts=False)
        outputs = [submit(engine, [prompt]) for prompt in (5, 6, 7)]
        add_finished, calls = Meter.add_finished, []

        def fail_once(meter, output):
            calls.append(output)
            if len(calls) == 2:
                raise MemoryError("no memory")
            add_finished(meter, output)

        monkeypatch.setattr(Meter, "add_finished", fail_once)
        engine.start()
        assert outputs[0].last().finish_reason is FinishReason.LENGTH
        assert all(isinstance(output.last().error, UnavailableError) for output in outputs[1:])
        engine.stop()
        assert [output.num_last for output in outputs] == [1, 1, 1]
        assert engine.drain(0)

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

    @pytest.mark.parametrize("error", [ValueError("nobody listens"), SystemExit()])
    def test_a_callback_that_raises_ends_its_request_only(self, make_engine, submit, error):
        engine = make_engine(starts=False)
        broken = Failing(error)
        engine.submit([5], GREEDY, broken)
        good = submit(engine, [6])
        engine.start()
        good.last()
        assert good.token_ids == greedy_tokens([6], 12)
        wait_until(lambda: is_at_rest(engine))
        assert broken.num_calls == 2  # the first output, and that it was cancelled


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), SystemExit()])
class TestObservers:
    """One that raises keeps no caller from exactly one last output, and the engine from no step."""

    @pytest.mark.parametrize("name", ["on_ended", "on_left"])
    def test_requests_end_as_without_it(self, make_engine, submit, name, error):
        engine = make_engine(starts=False)
        setattr(engine, name, observer := Failing(error))
        outputs = [submit(engine, [prompt]) for prompt in (5, 6, 7)]
        engine.start()
        assert [output.last().finish_reason for output in outputs] == [FinishReason.LENGTH] * 3
        outputs.append(submit(engine, [8]))
        assert outputs[-1].last().finish_reason is FinishReason.LENGTH
        assert engine.drain(60) and engine.status().is_alive
        engine.stop()
        assert [output.token_ids for output in outputs] == [greedy_tokens([prompt], 12) for prompt in (5, 6, 7, 8)]
        assert [output.num_last for output in outputs] == [1] * 4
        assert observer.num_calls > 1

    def test_a_trace_that_cannot_be_had_is_left_out(self, make_engine, monkeypatch, error):
        monkeypatch.setattr(ExpertTracker, "take_trace", Failing(error))
        engine = make_engine(observer=ExpertTracker((0,), 8, 2, StatisticsSettings()))
        for prompt in ([5], [6]):
            (answer,) = engine.generate([prompt], GREEDY, Observation(wants_trace=True))
            assert (answer.error, answer.trace, answer.token_ids) == (None, None, greedy_tokens(prompt, 12))
        assert engine.status().is_alive

    def test_an_engine_that_stops_answers_everyone(self, make_engine, submit, error):
        engine = make_engine(starts=False)
        engine.on_ended, engine.on_left = Failing(error), Failing(error)
        first = submit(engine, [5])
        engine.submit([6], GREEDY, broken := Failing(error))
        last = submit(engine, [7])
        engine.stop()
        assert [isinstance(output.last().error, UnavailableError) for output in (first, last)] == [True, True]
        assert (first.num_last, broken.num_calls, last.num_last) == (1, 1, 1)
        assert engine.drain(0)


def test_a_callback_that_stops_an_engine_which_stops_is_told_once(make_engine, submit):
    engine = make_engine(starts=False)
    first = Outputs()

    def stop(output):
        first(output)
        engine.stop()

    engine.submit([5], GREEDY, stop)
    last = submit(engine, [6])
    engine.stop()
    assert (first.num_last, last.num_last) == (1, 1)
    assert engine.drain(0)
