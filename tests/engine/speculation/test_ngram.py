"""What followed before is what is guessed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Request, RequestOutput
from amalgam.engine.speculation.ngram import NgramProposer
from amalgam.engine.speculation.proposer import Wanted


def ignore(output: RequestOutput) -> None:
    pass


def request_of(token_ids: Sequence[int], request_id: int = 1) -> Request:
    return Request(request_id, list(token_ids), SamplingParams(), ignore)


def guess(token_ids: Sequence[int], num_tokens: int = 4, min_match: int = 2) -> list[int]:
    return list(NgramProposer(min_match).propose([Wanted(request_of(token_ids), num_tokens)]).get(1, ()))


def test_what_followed_the_last_tokens_comes_again() -> None:
    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2, 3]) == [4, 5, 6, 9]
    assert guess([1, 2, 3, 4, 5, 6, 9, 1, 2, 3], num_tokens=2) == [4, 5]


def test_the_longest_match_counts_and_then_the_latest() -> None:
    assert guess([7, 1, 2, 10, 8, 1, 2, 20, 9, 7, 1, 2], 1) == [10]
    assert guess([1, 2, 10, 8, 1, 2, 20, 9, 1, 2], 1) == [20]


def test_too_little_in_common_is_no_guess() -> None:
    assert guess([1, 2, 3, 4, 2], min_match=2) == []
    assert guess([5], min_match=2) == []
    assert guess([1, 2, 3, 1, 2], min_match=3) == []


def test_text_that_repeats_itself_goes_on_doing_so() -> None:
    assert guess([9, 1, 2, 3, 1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert guess([5, 5, 5], 4) == [5, 5, 5, 5]


def test_a_request_that_grows_is_guessed_as_a_new_one_would_be() -> None:
    rng, grown = random.Random(0), NgramProposer(2)
    request = request_of([rng.randrange(4) for _ in range(5)])
    for _ in range(60):
        assert list(grown.propose([Wanted(request, 3)]).get(1, ())) == guess(request.token_ids, 3)
        request.token_ids += [rng.randrange(4) for _ in range(rng.randint(1, 4))]
    grown.forget(1)
    grown.forget(2)
    other = request_of([1, 2], request_id=1)
    assert grown.propose([Wanted(other, 3)]) == {}, "nothing is left of the request that had the number before"
