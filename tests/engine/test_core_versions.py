"""Weight versions: which request gets which, and when one is let go."""

import gc
import logging
import queue
import weakref

import pytest

from tests.engine.fakes import (
    FakeDecoder,
    FakeVersion,
    greedy_tokens,
)
from tests.engine.running import GREEDY, TINY_CACHE, Outputs, held_engine, is_at_rest, random_prompts, wait_until


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
