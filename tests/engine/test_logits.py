import pytest
import torch

from amalgam.engine.logits import RepetitionPenalty, process, processors_for
from amalgam.engine.request import Request, SamplingParams


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
