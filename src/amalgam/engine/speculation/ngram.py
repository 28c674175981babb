"""Prompt lookup: what followed the last tokens when they last occurred (Saxena, 2023).

In: a request's own tokens. Out: guesses. Must never know: models, tensors.

Answers that quote their prompt (code that is edited, summaries, tables) are guessed well, others not at all. It costs
no step; what it notes takes about 220 bytes for each token of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from amalgam.engine.request import Request
from amalgam.engine.speculation.proposer import Wanted

_MAX_CANDIDATES = 16  # latest occurrences that are compared
_MAX_MATCH = 32  # tokens; longer matches count as equally good


@dataclass
class _Index:
    """Where each `min_match` tokens of one request have occurred: the position behind them, in order."""

    num_tokens: int = 0  # that have been looked at
    positions: dict[tuple[int, ...], list[int]] = field(default_factory=dict)


class NgramProposer:
    """See above.

    Args:
        min_match: tokens that must have occurred before, at the least. Of several places that with the longest match
            counts, and of equally long ones the latest.
    """

    is_free = True
    num_computed = 0

    def __init__(self, min_match: int) -> None:
        assert min_match >= 1
        self._min_match = min_match
        self._indices: dict[int, _Index] = {}

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Sequence[int]]:
        """See `Proposer.propose`."""
        found = {request.request_id: self._guess(request, num_tokens) for request, num_tokens in wanted}
        return {request_id: guess for request_id, guess in found.items() if guess}

    def num_missing(self, request: Request) -> int:
        """See `Proposer.num_missing`."""
        return 0

    def forget(self, request_id: int) -> None:
        """See `Proposer.forget`."""
        self._indices.pop(request_id, None)

    def _guess(self, request: Request, num_tokens: int) -> list[int]:
        token_ids, size = request.token_ids, self._min_match
        index = self._indices.setdefault(request.request_id, _Index())
        # The last tokens are not yet followed by anything, so they are noted when they are.
        for end in range(max(index.num_tokens, size), len(token_ids)):
            index.positions.setdefault(tuple(token_ids[end - size : end]), []).append(end)
        index.num_tokens = max(index.num_tokens, len(token_ids))
        if len(token_ids) < size:
            return []
        candidates = index.positions.get(tuple(token_ids[-size:]), ())[-_MAX_CANDIDATES:]
        if not candidates:
            return []
        place = max(reversed(candidates), key=lambda end: _match(token_ids, end, size))
        guess: list[int] = []
        period = len(token_ids) - place
        while len(guess) < num_tokens:  # a place near the end is followed by the guess itself: text that repeats
            guess.append(token_ids[place + len(guess)] if len(guess) < period else guess[len(guess) - period])
        return guess


def _match(token_ids: Sequence[int], end: int, length: int) -> int:
    """How many tokens before `end` are the same as at the end of all, of which `length` are known to be."""
    limit = min(end, _MAX_MATCH)
    while length < limit and token_ids[end - length - 1] == token_ids[-length - 1]:
        length += 1
    return length
