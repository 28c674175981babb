"""Guesses of a model: a smaller one with the same vocabulary, or the same one in a lower precision.

In: requests. Out: guesses, drawn from the draft's logits with the number that will draw the model's own token. Must
never know: where the draft's weights come from, the model's keys and values.

The draft has a KV cache of its own. What it holds of a request is kept as long as the request runs and there is room:
tokens that have stayed are not computed again, those that came to nothing are overwritten. A prompt that is longer than
a step is computed in pieces, one each time that guesses are wanted; there are none until it is done.

Two draws with one number u are equal as often as the inverse distribution functions of both agree at u, which is
certain where both are greedy or certain of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from amalgam.engine.blocks import BlockPool
from amalgam.engine.request import Request
from amalgam.engine.sampler import choose_tokens
from amalgam.engine.speculation.proposer import Wanted
from amalgam.kernels.step import StepContext, StepSequence
from amalgam.models.decoder import Decoder
from amalgam.models.kv_cache import KVCache
from amalgam.models.weights import WeightVersion


@dataclass(eq=False)
class _Sequence:
    """What the draft has computed of one request.

    Attributes:
        token_ids: those whose keys and values are in its blocks.
        num_true: how many of them are known to be the request's own.
        generation: of the weights that have computed them.
    """

    generation: int
    token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_true: int = 0


@dataclass(eq=False)
class _Draft:
    """A guess in the making."""

    request: Request
    sequence: _Sequence
    num_tokens: int  # wanted
    new_ids: list[int]  # to be computed next
    guessed: list[int] = field(default_factory=list)


class DraftProposer:
    """See above. In the step thread, but for `set_version`.

    Args:
        decoder: runs the draft; nobody else runs steps with it.
        kv: its cache, of `num_blocks` blocks.
        max_step_tokens: most tokens that it computes in one step.
        max_positions: longest sequence that it can compute.
    """

    is_free = False

    def __init__(
        self,
        decoder: Decoder,
        version: WeightVersion,
        kv: KVCache,
        num_blocks: int,
        *,
        max_step_tokens: int,
        max_positions: int,
    ) -> None:
        assert not decoder.spec.state_bytes
        self._decoder = decoder
        self._kv = kv
        self._max_step_tokens = max_step_tokens
        self._max_positions = max_positions
        self._pool = BlockPool(num_blocks)
        self.num_computed = 0
        self._sequences: dict[int, _Sequence] = {}  # by request; those asked for last come last
        self._weights = 0, version  # and how many there have been before
        self.set_version(version)

    @property
    def version(self) -> WeightVersion:
        """The draft's weights."""
        return self._weights[1]

    @property
    def kv_cache_bytes(self) -> int:
        return self._kv.nbytes

    def set_version(self, version: WeightVersion) -> None:
        """Guess with other weights of the same model from the next step on. Any thread."""
        self._decoder.prepare(version, self._kv)
        self._weights = self._weights[0] + 1, version

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Sequence[int]]:
        """See `Proposer.propose`."""
        generation, version = self._weights  # to the end of the guess, whatever is set meanwhile
        drafts, budget = [], self._max_step_tokens
        kept = {request.request_id for request, _ in wanted}
        for wish in wanted:
            draft = self._begin(wish, generation, kept, budget)
            if draft is not None:
                drafts.append(draft)
                budget -= len(draft.new_ids)
        running = drafts
        while running:
            running = self._step(running, version)
        return {draft.request.request_id: draft.guessed for draft in drafts if draft.guessed}

    def num_missing(self, request: Request) -> int:
        """See `Proposer.num_missing`."""
        sequence = self._sequences.get(request.request_id)
        return len(request.token_ids) - (0 if sequence is None else min(len(sequence.token_ids), sequence.num_true))

    def forget(self, request_id: int) -> None:
        """See `Proposer.forget`."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._pool.free(reversed(sequence.block_ids))

    def _begin(self, wish: Wanted, generation: int, kept: set[int], budget: int) -> _Draft | None:
        """The next tokens to be computed for a request; None: there is no room, or a token that the draft lacks."""
        request = wish.request
        token_ids = request.token_ids
        num_tokens = min(wish.num_tokens, self._max_positions - len(token_ids) + 1)
        if num_tokens <= 0 or budget <= 0:
            return None
        sequence = self._sequences.pop(request.request_id, None)
        if sequence is None or sequence.generation != generation:
            sequence = _Sequence(generation, block_ids=[] if sequence is None else sequence.block_ids)
        self._sequences[request.request_id] = sequence
        self._cut(sequence, token_ids)
        start = len(sequence.token_ids)
        new_ids = token_ids[start : start + budget]
        if max(new_ids) >= self._decoder.spec.vocab_size:
            return None
        if not self._reserve(sequence, start + len(new_ids) + num_tokens - 1, kept):
            return None
        return _Draft(request, sequence, num_tokens, new_ids)

    def _cut(self, sequence: _Sequence, token_ids: Sequence[int]) -> None:
        """Leave of a sequence what is the request's own, but for its last token, whose logits are wanted."""
        num_true, limit = sequence.num_true, min(len(sequence.token_ids), len(token_ids) - 1)
        while num_true < limit and sequence.token_ids[num_true] == token_ids[num_true]:
            num_true += 1
        sequence.num_true = min(num_true, limit)
        del sequence.token_ids[sequence.num_true :]

    def _reserve(self, sequence: _Sequence, num_tokens: int, kept: set[int]) -> bool:
        """Get blocks for so many tokens, if need be from requests that want no guess now, longest unasked first."""
        num_missing = -(-num_tokens // self._kv.block_size) - len(sequence.block_ids)
        if num_missing <= 0:
            return True
        for request_id in [other for other in self._sequences if other not in kept]:
            if num_missing <= self._pool.num_free:
                break
            self.forget(request_id)
        if num_missing > self._pool.num_free:
            return False
        sequence.block_ids += self._pool.allocate(num_missing)
        return True

    def _step(self, drafts: Sequence[_Draft], version: WeightVersion) -> list[_Draft]:
        """Compute each one's new tokens and guess the next one; returns those that go on."""
        sequences, ready = [], []
        for draft in drafts:
            sequence, request = draft.sequence, draft.request
            first = len(sequence.token_ids)
            is_ready = first + len(draft.new_ids) == len(request.token_ids) + len(draft.guessed)
            self.num_computed += len(draft.new_ids)
            sequences.append(StepSequence(draft.new_ids, first, sequence.block_ids, int(is_ready)))
            if is_ready:
                ready.append(draft)
        logits = self._decoder.forward(StepContext(sequences, self._kv), version)
        for draft in drafts:
            draft.sequence.token_ids += draft.new_ids
            if not draft.guessed:
                draft.sequence.num_true = len(draft.sequence.token_ids)
        going_on: list[_Draft] = []
        if not ready:
            return going_on
        chosen = choose_tokens(logits, [(draft.request, tuple(draft.guessed)) for draft in ready])
        for draft, token_id in zip(ready, chosen, strict=True):
            if token_id < 0:  # a logit is not finite
                continue
            draft.guessed.append(token_id)
            draft.new_ids = [token_id]
            if len(draft.guessed) < draft.num_tokens and token_id not in draft.request.end_token_ids:
                going_on.append(draft)
        return going_on
