from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from amalgam.engine import sampler
from amalgam.engine.logits import processors_for
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Request, ScheduledRequest
from amalgam.engine.sampler import NonFiniteLogitsError, choose, uniform
from amalgam.errors import RequestError
from amalgam.kernels.backends.cpu import extension, sampling
from tests.cases import each_case
from tests.errors import raises
from tests.lazy import Lazy

transformers = Lazy("transformers")


VOCAB_SIZE = 300


def make_request(request_id=0, prompt=(1, 2, 3), generated=(), seed=0, **params):
    params = SamplingParams(**{"top_k": 0, "top_p": 1.0, "temperature": 1.0, **params})
    request = Request(
        request_id,
        list(prompt),
        params,
        on_output=lambda output: None,
        seed=seed,
        processors=processors_for(params),
    )
    request.token_ids += generated
    return request


def make_item(request, proposed_ids=()):
    """The share of a step that brings a request up to date, and computes proposals."""
    num_tokens = len(request.token_ids) + len(proposed_ids)
    return ScheduledRequest(request, 0, num_tokens, (), num_tokens, True, tuple(proposed_ids))


def sample(logits, requests):
    return sampler.sample(logits, [make_item(request) for request in requests])


def sampled(logits, requests):
    """Request id → its one new token."""
    return {request_id: token_id for request_id, ((token_id,), _) in sample(logits, requests).tokens.items()}


def make_logits(num_rows, seed=0, vocab_size=VOCAB_SIZE):
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def transformers_probabilities(logits, request):
    params = request.params
    processors = transformers.LogitsProcessorList(
        [transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)]
    )
    processors.append(transformers.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(transformers.TopKLogitsWarper(params.top_k))
    processors.append(transformers.TopPLogitsWarper(params.top_p))
    processors.append(transformers.MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([request.token_ids]), logits.clone()).softmax(dim=1)[0].double()


PARAMS = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_p": 0.8},
    {"top_k": 7},
    {"top_k": 40, "top_p": 0.9, "temperature": 0.7},
    {"min_p": 0.1},
    {"repetition_penalty": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.02},
    {"repetition_penalty": 0.7, "top_p": 0.5},
    {"top_p": 1e-6},
    {"top_k": 10_000},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_distribution_is_that_of_transformers(params):
    """4,000 draws hit exactly the tokens that transformers leaves, as often as it says."""
    num_draws = 4000
    logits = make_logits(1)
    occurred = logits[0].topk(4).indices.tolist()  # so that the penalty matters
    requests = [
        make_request(i, prompt=occurred[:2], generated=occurred[2:], seed=i, **params) for i in range(num_draws)
    ]
    expected = transformers_probabilities(logits, requests[0])
    drawn = sampled(logits.expand(num_draws, -1).contiguous(), requests).values()
    counts = torch.bincount(torch.tensor(list(drawn)), minlength=VOCAB_SIZE).double()
    assert set(counts.nonzero().flatten().tolist()) <= set(expected.nonzero().flatten().tolist())
    likely = expected * num_draws > 10
    deviation = (counts - expected * num_draws).abs() / (expected * num_draws).sqrt()
    assert deviation[likely].max() < 5


def test_choosing_follows_the_cumulative_distribution():
    scores = np.log([0.5, 0.2, 0.3])
    params = SamplingParams(temperature=1.0, top_p=1.0, top_k=0)
    assert [choose(scores, params, u) for u in (0.0, 0.49, 0.51, 0.69, 0.71, 1 - 2**-53)] == [0, 0, 1, 1, 2, 2]
    only_two = SamplingParams(temperature=1.0, top_p=0.75, top_k=0)  # 0.5 and 0.3
    assert [choose(scores, only_two, u) for u in (0.0, 0.62, 0.63, 1 - 2**-53)] == [0, 0, 2, 2]


def test_what_changes_logits_changes_a_copy():
    """A row is read by several: processors, log-probabilities, the check of guesses, other samples of one prompt."""
    logits = make_logits(4)
    before = logits.clone()
    changes = [{"repetition_penalty": 1.3}, {"logit_bias": {5: 4.0}}, {"presence_penalty": 1.0, "logprobs": 3}, {}]
    sample(logits, [make_request(index, **change) for index, change in enumerate(changes)])
    assert torch.equal(logits, before)


def test_ties_at_the_k_th_place_all_stay():
    logits = torch.tensor([[1.0, 5.0, 5.0, 5.0, 0.0]])
    drawn = {sampled(logits, [make_request(seed=seed, top_k=2)])[0] for seed in range(100)}
    assert drawn == {1, 2, 3}


def test_a_tiny_temperature_is_greedy():
    logits = make_logits(1)
    assert sampled(logits, [make_request(temperature=1e-300)]) == {0: int(logits.argmax())}


EXTREMES = [
    {"temperature": 1e-38}, {"temperature": 5e-324}, {"temperature": 100.0}, {"top_p": 1e-300}, {"top_p": 5e-324},
    {"min_p": 1.0}, {"min_p": 5e-324}, {"top_k": 1}, {"top_k": 2**31 - 1}, {"repetition_penalty": 0.01},
    {"repetition_penalty": 100.0}, {"repetition_penalty": 100.0, "temperature": 1e-38, "top_p": 1e-300},
]  # fmt: skip


@pytest.mark.parametrize("path", ["compiled", "torch"])
def test_no_parameter_makes_of_finite_logits_what_is_not(monkeypatch, path):
    if path == "torch":
        monkeypatch.setattr(extension, "is_available", lambda: False)
    with each_case() as case:
        for params, scale in product(EXTREMES, (1e-38, 1.0, 3e36, 1e38)):
            logits = make_logits(1).clamp(-3, 3) * scale
            occurred = [int(logits.argmax()), int(logits.argmin()), 5]
            with case(params, scale):
                result = sample(logits, [make_request(prompt=occurred, seed=2**63 - 1, **params)])
                assert result.errors == {}
                assert 0 <= result.tokens[0].token_ids[0] < VOCAB_SIZE


def test_a_penalty_hides_nothing_that_the_model_computed():
    logits = make_logits(1)
    logits[0, 5] = float("inf")
    result = sample(logits, [make_request(prompt=[5], repetition_penalty=2.0)])
    assert isinstance(result.errors[0], NonFiniteLogitsError)


@pytest.mark.parametrize("params", [{"do_sample": False}, {"temperature": 0.0}])
def test_greedy_takes_the_best_and_the_first_among_equals(params):
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert sampled(logits, [make_request(prompt=[0], **params)]) == {0: 1}


def test_the_repetition_penalty_holds_for_greedy_requests_too():
    logits = torch.tensor([[0.1, 3.0, 2.0, -1.0]])
    requests = [make_request(0, prompt=[1], do_sample=False, repetition_penalty=2.0)]
    assert sampled(logits, requests) == {0: 2}
    assert logits.tolist()[0] == pytest.approx([0.1, 3.0, 2.0, -1.0])  # the caller's logits stay as they are


def test_a_row_does_not_depend_on_the_others_to_the_bit():
    rng = np.random.default_rng(0)
    params = [*PARAMS, {"do_sample": False}, {"do_sample": False, "repetition_penalty": 1.2}]
    requests, rows = [], []
    for index in range(60):
        generated = rng.integers(0, VOCAB_SIZE, size=rng.integers(0, 20)).tolist()
        requests.append(make_request(index, generated=generated, seed=index, **params[index % len(params)]))
        rows.append(make_logits(1, seed=index)[0].bfloat16().float())  # with ties, as bfloat16 gives them
    logits = torch.stack(rows)
    alone = {i: sampled(logits[i : i + 1], [requests[i]])[i] for i in range(60)}
    for _ in range(20):
        chosen = rng.permutation(60)[: rng.integers(1, 40)].tolist()
        together = sampled(logits[chosen], [requests[i] for i in chosen])
        assert together == {i: alone[i] for i in chosen}


def test_a_proposal_whose_row_could_not_be_processed_brings_no_token():
    class FailsBehindProposals:
        def apply(self, logits, request, proposed_ids):
            if proposed_ids:
                raise RequestError("no")

    request = make_request(temperature=0.0)
    request.processors = (FailsBehindProposals(),)
    logits = make_logits(2)
    first = int(logits[0].argmax())
    result = sampler.sample(logits, [make_item(request, [first])])
    assert result.tokens[0].token_ids == (first,) and not result.errors


def test_the_uniform_number_is_a_function_of_seed_and_index():
    assert uniform(7, 3) == 0.4821286018761155  # answers to a seed stay what they were
    numbers = [uniform(seed, index) for seed in (0, 1, 2**63 - 1) for index in range(1000)]
    assert len(set(numbers)) == len(numbers)
    assert all(0 <= number < 1 for number in numbers)
    assert np.mean(numbers) == pytest.approx(0.5, abs=0.02)


def test_the_same_seed_draws_anew_for_each_token():
    logits = make_logits(1)
    draws = [sampled(logits, [make_request(generated=[5] * n, seed=3)])[0] for n in range(20)]
    assert len(set(draws)) > 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_fail_their_request_only(bad):
    logits = make_logits(3)
    logits[1, 17] = bad
    requests = [make_request(i, seed=i) for i in range(3)]
    result = sample(logits, requests)
    assert set(result.tokens) == {0, 2}
    assert isinstance(result.errors[1], NonFiniteLogitsError)
    assert result.errors[1].http_status == 500


class TestProposals:
    """A request gets the tokens that it would get without proposals, several in one step."""

    @pytest.mark.parametrize("params", PARAMS, ids=str)
    def test_those_that_would_be_chosen_come_true(self, params):
        logits = make_logits(5)
        alone, request = [], make_request(seed=7, **params)
        for row in range(5):
            alone.append(sampled(logits[row : row + 1], [request])[0])
            request.token_ids.append(alone[-1])
        for num_right in range(5):
            proposed = [*alone[:num_right], (alone[num_right] + 1) % VOCAB_SIZE, *alone[num_right + 1 :]][:4]
            item = make_item(make_request(seed=7, **params), proposed)
            result = sampler.sample(logits, [item])
            assert result.tokens[0].token_ids == tuple(alone[: num_right + 1])

    def test_rows_of_the_next_request_come_after_them(self):
        logits = make_logits(4)
        best = logits.argmax(dim=1).tolist()
        items = [make_item(make_request(0, do_sample=False), best[:2]), make_item(make_request(1, do_sample=False))]
        result = sampler.sample(logits, items)
        assert [result.tokens[i].token_ids for i in (0, 1)] == [tuple(best[:3]), (best[3],)]

    def test_a_row_that_is_not_finite_ends_them(self):
        logits = make_logits(3)
        best = logits.argmax(dim=1).tolist()
        logits[1, 5] = float("nan")
        result = sampler.sample(logits, [make_item(make_request(do_sample=False), best[:2])])
        assert result.tokens[0].token_ids == (best[0],)


class TestLogprobs:
    def test_they_are_of_the_models_own_logits(self):
        logits = make_logits(2)
        params = {"logprobs": 3, "temperature": 0.2, "top_k": 5, "repetition_penalty": 3.0, "min_p": 0.1}
        requests = [make_request(i, prompt=logits[i].topk(2).indices.tolist(), **params) for i in range(2)]
        result = sample(logits, requests)
        expected = logits.double().log_softmax(dim=1)
        for row in range(2):
            [token_id], [logprobs] = result.tokens[row]
            assert logprobs.chosen == pytest.approx(float(expected[row, token_id]), abs=1e-5)
            values, ids = expected[row].topk(3)
            assert [token_id for token_id, _ in logprobs.top] == ids.tolist()
            assert [value for _, value in logprobs.top] == pytest.approx(values.tolist(), abs=1e-5)

    def test_only_for_who_wants_them_and_as_many(self):
        wanted = [None, 0, 1, 20]
        result = sample(make_logits(4), [make_request(i, logprobs=count) for i, count in enumerate(wanted)])
        assert result.tokens[0].logprobs == ()
        assert [len(result.tokens[i].logprobs[0].top) for i in (1, 2, 3)] == [0, 1, 20]

    def test_more_than_the_vocabulary_has_are_all(self):
        [logprobs] = sample(make_logits(1, vocab_size=4), [make_request(logprobs=20, prompt=[0])]).tokens[0].logprobs
        assert sum(np.exp(value) for _, value in logprobs.top) == pytest.approx(1, abs=1e-6)

    def test_among_equals_the_smaller_id_comes_first(self):
        logits = torch.tensor([[1.0, 5.0, 2.0, 5.0, 5.0, 0.0]])
        [logprobs] = sample(logits, [make_request(logprobs=2)]).tokens[0].logprobs
        assert [token_id for token_id, _ in logprobs.top] == [1, 3]

    def test_each_token_that_comes_true_has_its_own(self):
        logits = make_logits(3)
        best = logits.argmax(dim=1).tolist()
        tokens = sampler.sample(logits, [make_item(make_request(do_sample=False, logprobs=1), best[:2])]).tokens[0]
        assert tokens.token_ids == tuple(best)
        expected = logits.log_softmax(dim=1).amax(dim=1).tolist()
        assert [logprobs.chosen for logprobs in tokens.logprobs] == pytest.approx(expected)


CARD = torch.device("cuda", 0)


def test_rows_on_a_card_are_drawn_there(monkeypatch):
    seen = []

    def draw(logits, rows):
        seen.extend(rows)
        return [7, 3]

    card = SimpleNamespace(supports=lambda logits: True, draw=draw)
    monkeypatch.setattr(sampler, "sampling_on_card", {CARD: card}.get)
    requests = [make_request(0, seed=5, generated=[1, 2], top_k=4), make_request(1, do_sample=False)]
    places = [(requests[0], (6,)), (requests[1], ())]
    assert sampler.choose_tokens(SimpleNamespace(is_cpu=False, device=CARD), places) == [7, 3]
    assert seen[0] == (4, 1.0, 1.0, 0.0, uniform(5, 3))
    assert seen[1][1] == 0.0


@pytest.mark.parametrize("reason", [None, "the card is too old"])
def test_a_card_draws_where_it_runs_the_model(monkeypatch, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr(sampler, "why_no_triton", lambda device: reason)
    found = sampler.sampling_on_card.__wrapped__(CARD)
    assert (found is None) == (reason is not None)


@pytest.mark.skipif(not extension.is_available(), reason="needs the native kernels")
class TestCompiled:
    """The extension draws the tokens that the arithmetic written here draws."""

    def without_it(self, logits, places):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extension, "is_available", lambda: False)
            return sampler.choose_tokens(logits, places)

    @pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 300, 5000])
    @pytest.mark.parametrize("params", PARAMS, ids=str)
    def test_draws_the_same_tokens(self, vocab_size, params):
        for seed in range(12):
            logits = make_logits(5, seed, vocab_size)
            if seed % 3 == 1:
                logits = logits.round()  # ties, also at the k-th
            requests = [
                make_request(row, prompt=(0,), generated=[0] * row, seed=seed * 2**59, **params) for row in range(5)
            ]
            places = [(request, ()) for request in requests]
            assert sampler.choose_tokens(logits, places) == self.without_it(logits, places)

    def test_extremes(self):
        logits = make_logits(8, vocab_size=1000)
        logits[1, 17], logits[2, 999], logits[3, 0] = float("nan"), float("inf"), -float("inf")
        logits[4] = 0.0
        logits[5] *= 1e30
        requests = [make_request(row, temperature=1e-300 if row == 6 else 1.0, do_sample=row != 7) for row in range(8)]
        places = [(request, ()) for request in requests]
        tokens = sampler.choose_tokens(logits, places)
        assert tokens == self.without_it(logits, places)
        assert tokens[1:4] == [-1, -1, -1]
        assert tokens[5:] == logits[5:].argmax(dim=1).tolist()

    def test_equal_logits_are_drawn_by_the_generator_alone(self):
        """With 2^16 equal logits the token is the first 16 bits of the number that decides."""
        logits = torch.zeros(1, 2**16)
        for seed in (0, 1, 2**63 + 5, 2**64 - 1):
            for index in (0, 1, 77):
                request = make_request(seed=seed, generated=[0] * index)
                assert sampler.choose_tokens(logits, [(request, ())]) == [int(uniform(seed, index) * 2**16)]

    def test_the_smallest_top_p_leaves_one(self):
        """Also where rounding makes its complement the whole, and all are equally likely."""
        requests = [make_request(row, seed=row, top_p=1e-300) for row in range(3)]
        logits = torch.stack((make_logits(1, vocab_size=100)[0], torch.zeros(100), torch.full((100,), 7.25)))
        places = [(request, ()) for request in requests]
        tokens = sampler.choose_tokens(logits, places)
        assert tokens == self.without_it(logits, places)
        assert tokens[0] == logits[0].argmax()

    def test_refuses_what_does_not_fit(self):
        good, wrong = ((1, 1.0, 1.0, 0.0), 0, 0), ((-1, 1.0, 1.0, 0.0), 0, 0)
        with raises(ValueError, "top_k", -1):
            sampling.draw(torch.zeros(1, 5), [wrong])
        for logits in (torch.zeros(2, 5), torch.zeros(1, 0), torch.zeros(1), torch.zeros(1, 5).double()):
            with raises(ValueError, tuple(logits.shape)):
                sampling.draw(logits, [good])
        assert sampling.draw(torch.zeros(1, 5), [good]) in ([0], [1], [2], [3], [4])

    def test_no_limit_is_the_whole_vocabulary(self):
        logits = make_logits(1, vocab_size=300)
        drawn = {sampling.draw(logits, [((top_k, 1.0, 1.0, 0.0), 7, 0)])[0] for top_k in (0, 300, 301, 2**31 - 1)}
        assert len(drawn) == 1
