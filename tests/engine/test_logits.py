import random
from collections import Counter

import numpy as np
import pytest
import torch

from amalgam.engine.logits import NEVER, CountPenalty, EndThinking, Follow, RepetitionPenalty, process, processors_for
from amalgam.engine.params import SamplingParams, ThinkingLimit
from amalgam.engine.request import Request
from amalgam.engine.sampler import choose_tokens
from amalgam.errors import RequestError
from tests.errors import raises
from tests.lazy import Lazy

transformers = Lazy("transformers")


def make_place(token_ids=(1, 2), proposed_ids=(), processors=()):
    request = Request(0, list(token_ids), SamplingParams(), lambda output: None, processors=tuple(processors))
    return request, tuple(proposed_ids)


class Add:
    def __init__(self, amount):
        self.amount = amount

    def apply(self, logits, request, proposed_ids):
        logits += self.amount


class Double:
    def apply(self, logits, request, proposed_ids):
        logits *= 2


def test_processors_apply_in_order_and_to_their_own_row():
    places = [make_place(processors=[Add(1), Double()]), make_place(), make_place(processors=[Double(), Add(1)])]
    assert process(torch.ones(3, 2), places)[0].tolist() == [[4, 4], [1, 1], [3, 3]]


@pytest.mark.parametrize("others", [[], [Add(1)]], ids=["some rows", "all rows"])
def test_the_models_logits_stay_as_they_are(others):
    logits = torch.ones(2, 2)
    process(logits, [make_place(processors=[Add(1)]), make_place(processors=others)])
    assert logits.tolist() == [[1, 1], [1, 1]]


def test_without_processors_nothing_is_copied():
    logits = torch.ones(1, 2)
    assert process(logits, [make_place()])[0] is logits


def test_neutral_parameters_need_no_processors():
    assert processors_for(SamplingParams()) == ()
    [penalty] = processors_for(SamplingParams(repetition_penalty=2.0))
    assert isinstance(penalty, RepetitionPenalty)


def test_the_repetition_penalty_is_once_for_each_token_that_occurred():
    place = make_place([1, 2, 2, 1], [3], [RepetitionPenalty(2.0)])
    [row], _ = process(torch.tensor([[4.0, 4.0, -4.0, 0.0, -4.0]]), [place])
    assert row.tolist() == [4.0, 2.0, -8.0, 0.0, -4.0]


def test_the_repetition_penalty_knows_tokens_that_come_later_and_forgets_proposals():
    request, _ = make_place([1], processors=[RepetitionPenalty(2.0)])
    logits = torch.ones(1, 4)
    assert process(logits, [(request, (2, 3))])[0].tolist() == [[1.0, 0.5, 0.5, 0.5]]
    assert process(logits, [(request, ())])[0].tolist() == [[1.0, 0.5, 1.0, 1.0]]
    request.token_ids.append(3)
    assert process(logits, [(request, ())])[0].tolist() == [[1.0, 0.5, 1.0, 0.5]]


def processed(logits, params, prompt_ids, generated=(), proposed_ids=(), eos_token_ids=frozenset()):
    processors = processors_for(params, eos_token_ids)
    request = Request(0, list(prompt_ids), params, lambda output: None, processors=processors)
    request.token_ids += generated
    [row], failed = process(logits, [(request, tuple(proposed_ids))])
    assert not failed
    return row


class TestCountPenalties:
    """As OpenAI defines them: mu[j] -= c[j] * frequency + (c[j] > 0) * presence, over the answer alone."""

    @pytest.mark.parametrize(("presence", "frequency"), [(0.5, 0.0), (0.0, 0.7), (1.5, -0.25), (-2.0, 2.0)])
    def test_they_follow_the_published_formula(self, presence, frequency):
        choose = random.Random(0)
        logits = torch.randn(1, 50)
        prompt, answer = [1, 2, 3], [choose.randrange(50) for _ in range(100)]
        params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
        expected = logits[0].double().clone()
        for token_id, count in Counter(answer).items():
            expected[token_id] -= count * frequency + presence
        for cut in (100, 98, 60):  # the rest is proposed
            found = processed(logits, params, prompt, answer[:cut], answer[cut:])
            assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-5)

    def test_tokens_come_one_by_one_and_proposals_are_forgotten(self):
        choose = random.Random(1)
        params = SamplingParams(presence_penalty=0.3, frequency_penalty=0.7)
        request = Request(0, [1], params, lambda output: None, processors=(CountPenalty(0.3, 0.7),))
        logits = torch.randn(1, 90)
        for step in range(200):
            proposed = tuple(choose.randrange(90) for _ in range(step % 4))
            [row], _ = process(logits, [(request, proposed)])
            [anew] = processed(logits, params, [1], [*request.token_ids[1:], *proposed])[None]
            assert row.tolist() == anew.tolist()  # to the bit
            request.token_ids.append(choose.randrange(90))


def test_biases_penalties_and_their_order_are_those_of_transformers():
    logits = torch.randn(1, 40) * 5
    biases = {3: 7.5, 1: -100.0, 39: 0.25}
    token_ids = [1, 3, 3, 17]
    expected = transformers.LogitsProcessorList(
        [transformers.SequenceBiasLogitsProcessor([[[key], value] for key, value in biases.items()]),
         transformers.RepetitionPenaltyLogitsProcessor(1.7)]
    )(torch.tensor([token_ids]), logits.clone())  # fmt: skip
    found = processed(logits, SamplingParams(logit_bias=biases, repetition_penalty=1.7), token_ids)
    assert found.tolist() == pytest.approx(expected[0].tolist(), abs=1e-5)


def test_a_bias_of_a_hundred_decides():
    logits = torch.randn(1, 40) * 5
    params = SamplingParams(logit_bias={7: 100.0}, temperature=1.0)
    assert int(processed(logits, params, [1]).argmax()) == 7
    banned = processed(logits, SamplingParams(logit_bias={7: -100.0}), [1])
    assert float(banned.softmax(dim=0)[7]) < 1e-30


class TestNoEnd:
    PARAMS = SamplingParams(min_tokens=3, stop_token_ids=(4,))

    @pytest.mark.parametrize(
        ("generated", "proposed", "is_free"), [(0, 0, 0), (2, 0, 0), (1, 1, 0), (3, 0, 1), (1, 2, 1)]
    )
    def test_ends_are_never_chosen_before_the_least_number(self, generated, proposed, is_free):
        logits = torch.zeros(1, 6)
        row = processed(logits, self.PARAMS, [1], [2] * generated, [2] * proposed, {0, 5})
        assert row.tolist() == ([0.0] * 6 if is_free else [NEVER, 0, 0, 0, NEVER, NEVER])

    def test_what_is_ignored_is_no_end(self):
        params = SamplingParams(min_tokens=3, stop_token_ids=(4,), ignore_eos=True)
        assert processed(torch.zeros(1, 6), params, [1], eos_token_ids={0, 5}).tolist() == [0, 0, 0, 0, NEVER, 0]

    def test_without_ends_there_is_nothing_to_do(self):
        assert processors_for(SamplingParams(min_tokens=3)) == ()


class State:
    """A grammar that blocks what it is told to."""

    def __init__(self, *blocked):
        self.masks = [None if mask is None else np.array(mask, np.bool_) for mask in blocked]

    def blocked(self, num_proposed):
        return self.masks[num_proposed]


class TestFollow:
    def test_only_what_may_follow_stays_and_no_padding(self):
        place = make_place(processors=[Follow(State([1, 0, 1, 0]))])
        [row], _ = process(torch.tensor([[5.0, -1.0, 7.0, -2.0, 9.0, 9.0]]), [place])
        assert row.tolist() == [NEVER, -1.0, NEVER, -2.0, NEVER, NEVER]

    def test_a_place_behind_a_wrong_proposal_stays(self):
        state = State([1, 0], None)
        logits = torch.ones(1, 2)
        assert process(logits, [make_place(proposed_ids=[0], processors=[Follow(state)])])[0].tolist() == [[1, 1]]

    def test_an_end_that_alone_is_left_comes_before_the_least_number(self):
        params = SamplingParams(min_tokens=3)
        request = Request(0, [1], params, lambda output: None)
        request.processors = processors_for(params, {0}, State([0, 1, 1]))
        [row], _ = process(torch.zeros(1, 3), [(request, ())])
        assert row.tolist() == [0.0, NEVER, NEVER]

    def test_one_that_fails_leaves_the_others(self):
        places = [make_place(processors=[Follow(State([1, 1]))]), make_place(processors=[Follow(State([1, 0]))])]
        rows, failed = process(torch.zeros(2, 2), places)
        assert isinstance(failed[0], RequestError)
        assert rows[1].tolist() == [NEVER, 0.0]

    @pytest.mark.parametrize(
        "params",
        [{"temperature": 1e-38}, {"temperature": 100.0}, {"top_k": 50, "top_p": 0.5}, {"do_sample": False}, {}],
    )
    @pytest.mark.parametrize("scale", [1.0, 1e38])
    def test_what_is_blocked_is_never_drawn(self, params, scale):
        blocked = np.ones(300, np.bool_)
        blocked[[7, 250]] = False
        logits = torch.randn(200, 300).clamp(-3, 3) * scale
        params = SamplingParams(**{"top_k": 0, "top_p": 1.0, **params})
        requests = [
            Request(0, [1], params, lambda output: None, seed=seed, processors=(Follow(State(blocked)),))
            for seed in range(200)
        ]
        places = [(request, ()) for request in requests]
        rows, _ = process(logits, places)
        assert set(choose_tokens(rows, places)) <= {7, 250}


def test_a_row_that_is_not_finite_stays_as_it_is():
    logits = torch.tensor([[1.0, torch.nan, 2.0]])
    rows, _ = process(logits, [make_place(processors=[RepetitionPenalty(2.0), Follow(State([0, 1, 0]))])])
    assert rows.isnan().tolist() == [[False, True, False]]


class TestThinking:
    """Token 7 opens reasoning, where the prompt has not, and 9 ends it."""

    @pytest.mark.parametrize(
        ("answer", "start_ids", "is_forced"),
        [
            ([], (), False),
            ([1, 2], (), False),
            ([1, 2, 3], (), True),
            ([1, 2, 9], (), False),
            ([1, 9, 3, 4, 5], (), False),
            ([7, 1, 2], (7,), False),
            ([7, 1, 2, 3], (7,), True),
            ([0, 7, 1, 2, 3], (7,), True),
            ([6, 7, 1, 2, 3], (6, 7), True),
            ([1, 2, 3, 4], (7,), False),
            ([1, 2, 3, 4, 5, 7, 1, 2, 3], (7,), False),  # it is text there
            ([7, 1, 2, 3, 9, 7, 1, 2, 3], (7,), False),
        ],
    )
    def test_its_end_is_all_that_follows_when_it_is_long_enough(self, answer, start_ids, is_forced):
        params = SamplingParams(thinking=ThinkingLimit(3, 9, start_ids))
        logits = torch.randn(1, 12)
        for cut in range(len(answer) + 1):  # the rest is proposed
            row = processed(logits, params, [7, 7], answer[:cut], answer[cut:])
            expected = (
                [float(NEVER)] * 9 + [float(logits[0, 9])] + [float(NEVER)] * 2 if is_forced else logits[0].tolist()
            )
            assert row.tolist() == expected

    def test_a_grammar_comes_first(self):
        params = SamplingParams(thinking=ThinkingLimit(0, 9))
        request = Request(0, [1], params, lambda output: None, processors=processors_for(params))
        logits = torch.zeros(1, 12)
        logits[0, 9] = float(NEVER)
        [row], _ = process(logits, [(request, ())])
        assert row.tolist() == logits[0].tolist()

    def test_what_opens_it_may_be_a_list(self):
        assert ThinkingLimit(3, 9, [6, 7]) == ThinkingLimit(3, 9, (6, 7))  # type: ignore[arg-type]
        with raises(RequestError, "start_ids", "7"):
            ThinkingLimit(3, 9, 7)  # type: ignore[arg-type]

    def test_proposals_are_forgotten(self):
        request = Request(0, [1], SamplingParams(), lambda output: None, processors=(EndThinking(ThinkingLimit(2, 9)),))
        logits = torch.zeros(1, 12)
        for proposed, is_forced in (((3, 4), True), ((9,), False), ((), False), ((3,), False)):
            [row], _ = process(logits, [(request, proposed)])
            assert (row[0] == NEVER) == is_forced
