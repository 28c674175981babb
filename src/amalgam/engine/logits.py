"""What changes logits before a token is chosen: an ordered list of processors for each request.

In: the logits of one place, as a copy that is theirs to change. Out: the same row, changed. Must never know: the model,
other requests, how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.engine.request import LogitsProcessor, Place, SamplingParams


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
