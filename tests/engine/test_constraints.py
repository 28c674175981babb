"""Answers that follow grammars."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from llguidance import LLMatcher

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import FinishReason
from amalgam.errors import RequestError
from amalgam.text.grammar import CompiledGrammar, Grammar, compile_grammar
from amalgam.text.grammar_trial import make_matcher, make_tokenizer
from tests.engine.fakes import FakeDecoder, greedy_tokens
from tests.engine.running import GREEDY, TINY_CACHE, Outputs, random_prompts


class HeldThreads(ThreadPoolExecutor):
    """Whose work waits until it is let go."""

    def __init__(self):
        super().__init__(2)
        self._is_let_go = threading.Event()
        self._given = []

    def submit(self, function, /, *arguments):
        def held():
            assert self._is_let_go.wait(60)
            return function(*arguments)

        self._given.append(super().submit(held))
        return self._given[-1]

    def finish(self):
        """Do what has been given since the last time; how much that was."""
        given, self._given = self._given, []
        self._is_let_go.set()
        for future in given:
            future.result(60)
        self._is_let_go.clear()
        return len(given)


class TestConstraints:
    """Answers follow their grammars whatever is guessed, preempted or beside them; others get what they get alone."""

    GRAMMARS = (Grammar("regex", "[a-z]{3,9}( [a-z]{3,9}){2,6}"), Grammar.of_choices(["yes", "no", "perhaps"]), None)

    def params(self, index):
        return SamplingParams(max_new_tokens=30, seed=index, temperature=2.0, top_k=0, top_p=1.0)

    def answers(self, engine, tokenizer, prompts):
        """One after the other submitted, all together computed."""
        constraints = [None if one is None else compile_grammar(tokenizer, one) for one in self.GRAMMARS]
        outputs = [Outputs() for _ in prompts]
        with engine.between_steps():
            for index, prompt in enumerate(prompts):
                constraint = constraints[index % len(constraints)]
                engine.submit(prompt, self.params(index), outputs[index], constraint=constraint)
        return [(one, one.last()) for one in outputs]

    @pytest.mark.parametrize("cache", [{}, TINY_CACHE], ids=["room", "preemptions"])
    def test_in_company(self, make_engine, tokenizer, cache):
        prompts = random_prompts(24, max_length=30)

        def propose(token_ids):
            """Sometimes right, mostly not."""
            return [*tokenizer.encode("no"), 7, 8] if len(token_ids) % 2 else tokenizer.encode(" abc def")

        plain = self.answers(make_engine(**cache), tokenizer, prompts)
        guessed = self.answers(make_engine(propose=propose, **cache), tokenizer, prompts)
        assert [one.token_ids for one, _ in plain] == [one.token_ids for one, _ in guessed]
        for index, (one, last) in enumerate(plain):
            assert last.error is None
            if index % 3 == 0 and last.finish_reason is FinishReason.STOP:
                assert re.fullmatch("[a-z]{3,9}( [a-z]{3,9}){2,6}", one.text)
            if index % 3 == 1:
                assert (last.finish_reason, one.text in {"yes", "no", "perhaps"}) == (FinishReason.STOP, True)
            if index % 3 == 2:
                [alone] = make_engine().generate([prompts[index]], self.params(index))
                assert one.token_ids == alone.token_ids

    def test_an_answer_ends_with_its_grammar_though_ends_are_ignored(self, make_engine, tokenizer):
        params = SamplingParams(max_new_tokens=30, ignore_eos=True, min_tokens=20)
        constraint = compile_grammar(tokenizer, Grammar.of_choices(["perhaps", "never"]))
        for answer in make_engine().generate([[1], [2], [3]], params, constraint=constraint):
            assert answer.text in {"perhaps", "never"}
            assert (answer.finish_reason, answer.stopped_by) == (FinishReason.STOP, None)

    def test_one_that_cannot_go_on_fails_alone(self, make_engine, tokenizer):
        state = compile_grammar(tokenizer, Grammar("regex", "a{40}")).start()
        state.error = RequestError("The grammar is lost.")
        broken = Outputs()
        engine = make_engine(starts=False)
        good = Outputs()
        engine.submit([1], GREEDY, good)
        engine.submit([1], GREEDY, broken, constraint=SimpleNamespace(start=lambda: state))
        engine.start()
        assert broken.last().finish_reason is FinishReason.ERROR
        assert good.last().error is None
        assert good.token_ids == greedy_tokens([1], 12)

    def test_masks_are_made_while_the_step_is_computed(self, make_engine, tokenizer):
        """They are begun before it, take nothing that it gives, and hold nobody up: here they end within it."""
        tokens, special_ids, encode = tokenizer.grammar_vocabulary()
        vocabulary = make_tokenizer(tokens, special_ids, sorted(tokenizer.eos_token_ids), encode)
        decoder, steps = FakeDecoder(), []
        with HeldThreads() as threads:
            matcher = make_matcher(vocabulary, str(LLMatcher.grammar_from_regex("[a-z]{12}")))
            constraint = CompiledGrammar(matcher, tokenizer.vocab_size, threads)
            decoder.on_step = lambda token_ids: steps.append((threads.finish(), len(token_ids)))
            answers = make_engine(decoder).generate([[1], [2]], self.params(0), constraint=constraint)
            assert all(re.fullmatch("[a-z]{12}", answer.text) for answer in answers)
        assert steps and all(num_masks == num_sequences for num_masks, num_sequences in steps)
