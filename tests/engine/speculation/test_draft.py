"""A draft against models that are tables: each token's logits follow from the token before it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from amalgam.engine.params import SamplingParams
from amalgam.engine.request import Request, ScheduledRequest
from amalgam.engine.sampler import sample
from amalgam.engine.speculation import draft as draft_module
from amalgam.engine.speculation.draft import DraftProposer
from amalgam.engine.speculation.proposer import Wanted
from amalgam.kernels.step import StepContext
from amalgam.models.kv_cache import KVCache
from tests.engine.running import all_made
from tests.engine.speculation.test_ngram import ignore

VOCAB_SIZE = 6
BLOCK_SIZE = 4
CHI_SQUARE_35 = 66.62  # what 35 degrees of freedom exceed once in 1,000 times


class TableDecoder:
    """Checks that the cache holds the sequence that it is asked about.

    Attributes:
        num_rows: computed so far.
    """

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.num_rows = 0
        self.spec = SimpleNamespace(
            vocab_size=len(table), kv_shapes=((1, 1, 1),), index_dims=(0,), state_shapes=(None,), state_bytes=0
        )

    def prepare(self, version: Any, kv: Any) -> None:
        pass

    def forward(self, context: StepContext, version: Any) -> torch.Tensor:
        keys = context.kv.layers[0].keys
        keys[context.slot_ids] = context.token_ids[:, None, None].to(keys.dtype)
        self.num_rows += len(context.token_ids)
        self.seen = [
            [int(keys[block_ids[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE, 0, 0]) for place in range(end)]
            for new_ids, first, block_ids, _, _ in context.sequences
            for end in (first + len(new_ids),)
        ]
        return self.table[context.token_ids[context.logit_rows]]


def draft_of(table: torch.Tensor, num_blocks: int = 64, **limits: int) -> tuple[DraftProposer, TableDecoder]:
    decoder: Any = TableDecoder(table)
    kv = KVCache.allocate(decoder.spec, num_blocks, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    limits = {"max_step_tokens": 64, "max_positions": 256} | limits
    version: Any = SimpleNamespace(version_id=1)
    return DraftProposer(decoder, version, kv, num_blocks, **limits), decoder


def request_of(request_id: int, prompt: Sequence[int], **params: Any) -> Request:
    given = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 64} | params
    return Request(request_id, list(prompt), SamplingParams(**given), ignore, seed=request_id)


def table_of(seed: int) -> torch.Tensor:
    return 0.6 * torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


CYCLE = 20 * torch.eye(VOCAB_SIZE).roll(1, dims=1)  # 0, 1, 2, …


def propose(draft: DraftProposer, request: Request, num_tokens: int) -> list[int]:
    return list(draft.propose([Wanted(request, num_tokens)]).get(request.request_id, ()))


def test_the_drafts_own_continuation_is_guessed_and_nothing_is_computed_twice() -> None:
    draft, decoder = draft_of(CYCLE)
    request = request_of(1, [0, 1, 2, 3, 4], do_sample=False)
    assert draft.num_missing(request) == 5
    assert propose(draft, request, 3) == [5, 0, 1]
    assert decoder.num_rows == 5 + 2
    request.token_ids += [5, 0, 1, 2]  # all came true, and one token more
    assert propose(draft, request, 2) == [3, 4]
    assert decoder.num_rows == 7 + 2 + 1, "the last guess and the token behind it were not computed yet"
    request.token_ids += [0, 3]  # the second guess was wrong
    assert propose(draft, request, 2) == [4, 5]
    assert decoder.seen == [[*request.token_ids, 4]]
    assert draft.num_computed == decoder.num_rows


def test_a_long_prompt_is_computed_in_pieces() -> None:
    draft, decoder = draft_of(CYCLE, max_step_tokens=8)
    request = request_of(1, [index % VOCAB_SIZE for index in range(20)], do_sample=False)
    assert [propose(draft, request, 2) for _ in range(3)] == [[], [], [2, 3]]
    assert decoder.num_rows == 20 + 1


def test_blocks_go_to_whoever_wants_a_guess_now(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = all_made(monkeypatch, draft_module, "BlockPool")
    draft, _ = draft_of(CYCLE, num_blocks=4)
    first, second = (request_of(number, [0] * 11, do_sample=False) for number in (1, 2))
    assert propose(draft, first, 2) == [1, 2]
    assert propose(draft, second, 2) == [1, 2], "the first one is not asked for, and makes room"
    assert propose(draft, first, 2) == [1, 2]
    assert draft.propose([Wanted(first, 2), Wanted(second, 2)]) == {1: [1, 2]}, "no room for both"
    draft.forget(1)
    draft.forget(2)
    assert [pool.num_free for pool in pools] == [4]


def test_it_ends_where_the_answer_or_the_draft_does() -> None:
    draft, _ = draft_of(CYCLE, max_positions=6)
    request = request_of(1, [0, 1, 2], do_sample=False)
    request.end_token_ids = frozenset({4})
    assert propose(draft, request, 8) == [3, 4]
    other = request_of(2, [0, 1, 2, 3], do_sample=False)
    assert propose(draft, other, 8) == [4, 5, 0]
    assert propose(draft, request_of(3, [0] * 7), 8) == []
    assert propose(draft, request_of(4, [0, VOCAB_SIZE]), 2) == [], "a token that the draft does not have"


def test_other_weights_compute_the_request_again() -> None:
    draft, decoder = draft_of(CYCLE)
    request = request_of(1, [0, 1, 2], do_sample=False)
    propose(draft, request, 1)
    version: Any = SimpleNamespace(version_id=1)  # its number says nothing: it may be the model's
    draft.set_version(version)
    assert propose(draft, request, 1) == [3]
    assert decoder.num_rows == 3 + 3


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_sampled_distribution_is_the_models_own(temperature: float) -> None:
    """Chi-square over the first two tokens of 4,000 answers, that the draft has a part in."""
    target, other = table_of(1), table_of(1) + 0.7 * table_of(2)
    draft, _ = draft_of(other, num_blocks=4096, max_step_tokens=4096)
    requests = [request_of(seed, [0], temperature=temperature) for seed in range(4000)]
    num_proposed = num_accepted = 0
    first_guesses: Counter[int] = Counter()
    for start in range(0, len(requests), 500):
        batch = requests[start : start + 500]
        while waiting := [request for request in batch if request.num_new_tokens < 2]:
            proposed = draft.propose([Wanted(request, 2) for request in waiting])
            items = []
            for request in waiting:
                guess = tuple(proposed[request.request_id])
                first_guesses[guess[0]] += not request.num_new_tokens
                items.append(
                    ScheduledRequest(
                        request,
                        len(request.token_ids) - 1,
                        1 + len(guess),
                        (),
                        0,
                        needs_sample=True,
                        proposed_ids=guess,
                    )
                )
            rows = [token_id for item in items for token_id in item.token_ids]
            result = sample(target[torch.tensor(rows)], items)
            for item in items:
                new = result.tokens[item.request.request_id].token_ids
                item.request.token_ids += new
                num_proposed += len(item.proposed_ids)
                num_accepted += len(new) - 1
        for request in batch:
            draft.forget(request.request_id)
    assert 0.3 < num_accepted / num_proposed < 0.95
    probabilities = (target.double() / temperature).softmax(dim=1).numpy()
    expected = np.outer(probabilities[0], np.ones(VOCAB_SIZE)) * probabilities * len(requests)
    counts = np.zeros((VOCAB_SIZE, VOCAB_SIZE))
    for request in requests:
        counts[request.token_ids[1], request.token_ids[2]] += 1
    assert expected.min() > 3
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_35
    # The same of what the draft says is far off, so the test would see it.
    guesses = np.array([first_guesses[token_id] for token_id in range(VOCAB_SIZE)])
    alone = probabilities[0] * len(requests)
    assert ((guesses - alone) ** 2 / alone).sum() > CHI_SQUARE_35
