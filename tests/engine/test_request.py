import pytest

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import checked_prompt
from amalgam.errors import RequestError
from tests.errors import raises


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", True),
        ("max_new_tokens", 2**63),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 1.5),
        ("min_p", float("inf")),
        ("repetition_penalty", 0.0),
        ("seed", -1),
        ("seed", 2**63),
        ("do_sample", "no"),
        ("ignore_eos", None),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop", ("x" * 1025,)),
        ("stop", (1,)),
        ("stop", 5),
        ("min_tokens", -1),
        ("stop_token_ids", 5),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (True,)),
        ("stop_token_ids", (1,) * 129),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("logit_bias", [(1, 2)]),
        ("logit_bias", (1, 2)),
        ("logit_bias", {"1": 2}),
        ("logit_bias", {-1: 2}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {1: "2"}),
        ("logit_bias", dict.fromkeys(range(1025), 0)),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("priority", 0.5),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field, value):
    with raises(RequestError, field):
        SamplingParams(**{field: value})


def test_no_more_tokens_are_demanded_than_may_be_generated():
    asked = SamplingParams(min_tokens=600)
    assert asked.over(SamplingParams(max_new_tokens=600)).min_tokens == 600
    with raises(RequestError, "min_tokens", 600, 599):
        asked.over(SamplingParams(max_new_tokens=599))
    with raises(RequestError, "min_tokens", 5, 4):
        SamplingParams(max_new_tokens=4, min_tokens=5)


def test_stop_may_be_a_string_or_a_list():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_biases_are_kept_in_the_order_of_tokens():
    params = SamplingParams(logit_bias={7: 1.5, 3: -100})
    assert params.logit_bias == ((3, -100), (7, 1.5))
    assert SamplingParams(temperature=1.0).over(params).logit_bias == params.logit_bias
    hash(params)


def test_only_a_prompt_that_is_scored_needs_no_answer():
    assert SamplingParams(max_new_tokens=0, prompt_logprobs=0).max_new_tokens == 0
    with raises(RequestError, "max_new_tokens", 0):
        SamplingParams(max_new_tokens=0, logprobs=1)


def test_greedy_is_no_sampling_or_no_temperature():
    assert SamplingParams(do_sample=False).is_greedy
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams().is_greedy


@pytest.mark.parametrize(
    ("prompt_ids", "named"),
    [([], ()), ([1, 8], (1, 8)), ([-1], (0, -1)), ([True], (0, True)), ([1.0], (0, 1.0))],
)
def test_a_prompt_holds_token_ids_of_the_model(prompt_ids, named):
    with raises(RequestError, *named):
        checked_prompt(prompt_ids, vocab_size=8)


def test_the_first_token_that_is_none_is_named():
    with raises(RequestError, 2, -3, 7):
        checked_prompt([0, 7, -3, 8, "5"], vocab_size=8)


def test_a_prompt_that_was_checked_is_looked_at_again_for_a_smaller_vocabulary_only():
    checked = checked_prompt([0, 7], vocab_size=8)
    assert checked == (0, 7)
    assert checked_prompt(checked, vocab_size=8) is checked_prompt(checked, vocab_size=9) is checked
    with raises(RequestError, 1, 7):
        checked_prompt(checked, vocab_size=7)
