"""What changes logits before a token is chosen: an ordered list of processors for each request.

In: the logits of one place, as a copy that is theirs to change. Out: the same row, changed. Must never know: the model,
other requests, how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.engine.request import LogitsProcessor, Request, SamplingParams

Place = tuple[Request, tuple[int, ...]]  # a row of logits is for the token after a request's own and some proposed ones


class RepetitionPenalty:
    """Divides positive and multiplies negative logits of tokens that occurred so far (Keskar et al., 2019)."""

    def __init__(self, penalty: float) -> None:
        self._penalty = np.float32(penalty)
        self._token_ids = np.empty(0, np.int64)  # of the request, kept because to convert a list takes longest of all

    def apply(self, logits: npt.NDArray[np.float32], request: Request, proposed_ids: Sequence[int]) -> None:
        """See `LogitsProcessor`."""
        self._token_ids = _extended(self._token_ids, request.token_ids[len(self._token_ids) :])
        token_ids = _extended(self._token_ids, proposed_ids)
        scores = logits[token_ids]
        # A parameter must not turn what the model computed into infinity, nor hide it if the model did.
        largest = np.finfo(np.float32).max
        with np.errstate(over="ignore", invalid="ignore"):
            penalized = np.where(scores < 0, scores * self._penalty, scores / self._penalty).clip(-largest, largest)
        # A token that occurred twice is written the same twice.
        logits[token_ids] = np.where(np.isfinite(scores), penalized, scores)


def _extended(token_ids: npt.NDArray[np.int64], more: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.concatenate((token_ids, np.array(more, np.int64))) if more else token_ids


def processors_for(params: SamplingParams) -> tuple[LogitsProcessor, ...]:
    """A request's processors, in the order in which they are applied; none if the logits stay as they are."""
    return (RepetitionPenalty(params.repetition_penalty),) if params.repetition_penalty != 1.0 else ()


def process(logits: Tensor, places: Sequence[Place]) -> Tensor:
    """Logits as the processors leave them: a copy on the same device, or the tensor given if there are no processors.

    The tensor given is never written to: the model's logits stay as they are for whoever reads them. Only rows that are
    processed come to main memory.

    Args:
        logits: float32 `[places, vocabulary]`.
    """
    indices = [index for index, (request, _) in enumerate(places) if request.processors]
    if not indices:
        return logits
    is_all = len(indices) == len(places)
    rows = logits.detach().clone() if is_all else logits[indices]
    processed = rows.cpu().numpy()
    for row, index in zip(processed, indices, strict=True):
        request, proposed_ids = places[index]
        for processor in request.processors:
            processor.apply(row, request, proposed_ids)
    rows = torch.from_numpy(processed).to(logits.device)
    if is_all:
        return rows
    result = logits.clone()
    result[indices] = rows
    return result
