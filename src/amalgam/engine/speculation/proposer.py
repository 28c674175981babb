"""What a proposer is: somebody who guesses the next tokens of requests.

A guess changes no answer: the step computes the guessed tokens behind a request's own, and keeps them as long as they
are what the model itself would have chosen (`amalgam.engine.sampler`). That holds for sampled answers too. The number
that chooses a token depends on the request's seed and the token's place alone, so that a proposer that draws from its
own distribution with the same number is right as often as two draws can be coupled that way, and a wrong guess is
thrown away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from amalgam.engine.request import Request


class Wanted(NamedTuple):
    """Guesses for one request."""

    request: Request
    num_tokens: int  # at most so many, at least 1


class Proposer(Protocol):
    """Guesses tokens. In the step thread only.

    Attributes:
        is_free: guesses cost next to nothing, so they are made first and chosen among afterwards.
        num_computed: tokens that it has computed since the start.
    """

    is_free: bool
    num_computed: int

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Sequence[int]]:
        """Request id → tokens that may follow the request's own; requests without a guess may be left out."""

    def num_missing(self, request: Request) -> int:
        """How many of the request's tokens are to be computed before its first guess."""

    def forget(self, request_id: int) -> None:
        """The request has ended. One that was never asked for may be named too."""
