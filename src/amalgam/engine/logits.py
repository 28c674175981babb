"""What changes logits before a token is chosen: an ordered list of processors for each request.

In: the logits of one place, as a copy that is theirs to change. Out: the same row, changed. Must never know: the model,
other requests, how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from amalgam.engine.request import Request, SamplingParams


class Place(NamedTuple):
    """What a row of logits is for: the token after a request's own and, where tokens are proposed, some of those."""

    request: Request
    proposed_ids: tuple[int, ...] = ()

    @property
    def token_ids(self) -> Sequence[int]:
        """All tokens before this place, the prompt's too."""
        known = self.request.token_ids
        return [*known, *self.proposed_ids] if self.proposed_ids else known

    @property
    def index(self) -> int:
        """Which token of the answer it is."""
        return self.request.num_new_tokens + len(self.proposed_ids)


class LogitsProcessor(Protocol):
    """One change of logits. Made when its request is submitted; used in the step thread."""

    def apply(self, logits: Tensor, place: Place) -> None:
        """Change float32 logits `[vocabulary]` in place. The result depends on nothing but these and the place."""


class RepetitionPenalty:
    """Divides positive and multiplies negative logits of tokens that occurred so far (Keskar et al., 2019)."""

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty

    def apply(self, logits: Tensor, place: Place) -> None:
        """See `LogitsProcessor`."""
        token_ids = torch.tensor(place.token_ids, device=logits.device)
        scores = logits[token_ids]
        penalty = torch.full_like(scores, self._penalty)
        penalized = torch.where(scores < 0, scores * penalty, scores / penalty)
        # A parameter must not turn what the model computed into infinity, nor hide it if the model did.
        largest = torch.finfo(logits.dtype).max
        # A token that occurred twice is written the same twice.
        logits[token_ids] = torch.where(scores.isfinite(), penalized.clamp(-largest, largest), scores)


def processors_for(params: SamplingParams) -> tuple[LogitsProcessor, ...]:
    """A request's processors, in the order in which they are applied; none if the logits stay as they are."""
    return (RepetitionPenalty(params.repetition_penalty),) if params.repetition_penalty != 1.0 else ()


def process(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Logits as the processors leave them: a new tensor, or the one given if there are no processors. Never written to:
    the model's logits stay as they are for whoever reads them.

    Args:
        logits: float32 `[places, vocabulary]`.
    """
    if not any(place.request.processors for place in places):
        return logits
    logits = logits.clone()
    for row, place in zip(logits, places, strict=True):
        for processor in place.request.processors:
            processor.apply(row, place)
    return logits
