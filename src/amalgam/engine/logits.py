"""What changes logits before a token is chosen: an ordered list of processors for each request.

In: the logits of one place, as a copy that is theirs to change. Out: the same row, changed. Must never know: the model,
other requests, how a token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from copy import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.engine.params import SamplingParams, ThinkingLimit
from amalgam.engine.request import LogitsProcessor, Request
from amalgam.errors import RequestError
from amalgam.text.grammar import GrammarState

Place = tuple[Request, tuple[int, ...]]  # a row of logits is for the token after a request's own and some proposed ones

# Of a token that may not be chosen. Infinity would say that the model computed it.
NEVER = np.finfo(np.float32).min
_MAX_TOKENS_BEFORE_THINKING = 4  # white space


class LogitBias:
    """Adds to the logits of some tokens.

    Args:
        pairs: token id and what is added.
    """

    def __init__(self, pairs: Sequence[tuple[int, float]]) -> None:
        self._token_ids = np.array([token_id for token_id, _ in pairs], np.int64)
        self._biases = np.array([bias for _, bias in pairs], np.float32)

    def apply(self, logits: npt.NDArray[np.float32], request: Request, proposed_ids: Sequence[int]) -> None:
        """See `LogitsProcessor`."""
        logits[self._token_ids] += self._biases


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
        with np.errstate(over="ignore"):  # a parameter must not turn what the model computed into infinity
            penalized = np.where(scores < 0, scores * self._penalty, scores / self._penalty)
        # A token that occurred twice is written the same twice.
        logits[token_ids] = penalized.clip(NEVER, -NEVER)


def _extended(token_ids: npt.NDArray[np.int64], more: Sequence[int]) -> npt.NDArray[np.int64]:
    return np.concatenate((token_ids, np.array(more, np.int64))) if more else token_ids


class CountPenalty:
    """Takes from the logit of each token of the answer `frequency` for each time that it occurred, and `presence` once.

    As in OpenAI's interface; the prompt does not count.
    """

    def __init__(self, presence: float, frequency: float) -> None:
        self._presence, self._frequency = np.float32(presence), np.float32(frequency)
        self._places: dict[int, int] = {}  # token id → its place in the arrays, in the order of occurrence
        self._token_ids = np.empty(16, np.int64)
        self._counts = np.empty(16, np.float32)
        self._num_seen = 0  # tokens of the answer that have been counted

    def apply(self, logits: npt.NDArray[np.float32], request: Request, proposed_ids: Sequence[int]) -> None:
        """See `LogitsProcessor`."""
        new = request.token_ids[request.num_prompt_tokens + self._num_seen :]
        self._num_seen += len(new)
        self._count(new, 1)
        self._count(proposed_ids, 1)
        token_ids, counts = self._token_ids[: len(self._places)], self._counts[: len(self._places)]
        logits[token_ids] -= self._frequency * counts + self._presence * (counts > 0)
        self._count(proposed_ids, -1)

    def _count(self, token_ids: Sequence[int], step: int) -> None:
        for token_id in token_ids:
            place = self._places.get(token_id)
            if place is None:
                place = self._places[token_id] = len(self._places)
                if place == len(self._counts):
                    self._token_ids = np.resize(self._token_ids, 2 * place)
                    self._counts = np.resize(self._counts, 2 * place)
                self._token_ids[place], self._counts[place] = token_id, 0
            self._counts[place] += step


class Follow:
    """Leaves the tokens with which the answer may go on under a grammar, end-of-sequence tokens where it may end."""

    def __init__(self, state: GrammarState) -> None:
        self._state = state

    def apply(self, logits: npt.NDArray[np.float32], request: Request, proposed_ids: Sequence[int]) -> None:
        """See `LogitsProcessor`."""
        blocked = self._state.blocked(len(proposed_ids))
        if blocked is None:  # wrong proposals, or the end of the answer, come before this place
            return
        if blocked.all():
            raise RequestError("The grammar lets no token follow, and no end.", remedy="Correct the grammar.")
        size = min(len(blocked), len(logits))
        np.copyto(logits[:size], NEVER, where=blocked[:size])
        logits[size:] = NEVER  # rows with which an embedding is padded


class EndThinking:
    """Lets nothing but the end of reasoning follow once it is as long as it may be, unless a grammar forbids that end.

    What opens reasoning is looked for at the answer's beginning only: later it is text like any other.
    """

    def __init__(self, limit: ThinkingLimit) -> None:
        self._limit = limit
        self._num_seen = 0  # tokens of the answer
        self._begun: tuple[int, ...] = ()  # the answer's first tokens, as long as nothing has opened reasoning
        self._num_thought: int | None = None if limit.start_ids else 0  # None: reasoning is not going on
        self._is_over = False

    def apply(self, logits: npt.NDArray[np.float32], request: Request, proposed_ids: Sequence[int]) -> None:
        """See `LogitsProcessor`."""
        new = request.token_ids[request.num_prompt_tokens + self._num_seen :]
        self._num_seen += len(new)
        for token_id in new:
            self._take(token_id)
        num_thought = self._num_thought
        if proposed_ids:
            ahead = copy(self)
            for token_id in proposed_ids:
                ahead._take(token_id)
            num_thought = ahead._num_thought
        end_id = self._limit.end_id
        if num_thought is None or num_thought < self._limit.num_tokens or logits[end_id] == NEVER:
            return
        score = logits[end_id]
        logits[:] = NEVER
        logits[end_id] = score

    def _take(self, token_id: int) -> None:
        if self._is_over:
            return
        if self._num_thought is not None:
            self._is_over = token_id == self._limit.end_id
            self._num_thought = None if self._is_over else self._num_thought + 1
            return
        self._begun, start_ids = (*self._begun, token_id), self._limit.start_ids
        if self._begun[-len(start_ids) :] == start_ids:
            self._num_thought = 0
        else:
            self._is_over = len(self._begun) >= len(start_ids) + _MAX_TOKENS_BEFORE_THINKING


class NoEndBefore:
    """Keeps an answer from ending before it has so many tokens, unless nothing else may follow.

    Args:
        end_ids: the tokens that end it.
    """

    def __init__(self, min_tokens: int, end_ids: AbstractSet[int]) -> None:
        self._min_tokens = min_tokens
        self._end_ids = np.array(sorted(end_ids), np.int64)

    def apply(self, logits: npt.NDArray[np.float32], request: Request, proposed_ids: Sequence[int]) -> None:
        """See `LogitsProcessor`."""
        if request.num_new_tokens + len(proposed_ids) >= self._min_tokens:
            return
        scores = logits[self._end_ids]
        logits[self._end_ids] = NEVER
        if logits.max() == NEVER:  # a grammar leaves nothing else
            logits[self._end_ids] = scores


def processors_for(
    params: SamplingParams, eos_token_ids: AbstractSet[int] = frozenset(), constraint: GrammarState | None = None
) -> tuple[LogitsProcessor, ...]:
    """A request's processors, in the order in which they are applied; none if the logits stay as they are.

    The order is that of transformers. What keeps tokens from being chosen comes last, so that nothing brings them back.

    Args:
        eos_token_ids: of the model.
    """
    found: list[LogitsProcessor] = []
    if params.biases:
        found.append(LogitBias(params.biases))
    if params.repetition_penalty != 1.0:
        found.append(RepetitionPenalty(params.repetition_penalty))
    if params.presence_penalty or params.frequency_penalty:
        found.append(CountPenalty(params.presence_penalty, params.frequency_penalty))
    if constraint is not None:
        found.append(Follow(constraint))
    if params.thinking is not None:
        found.append(EndThinking(params.thinking))
    end_ids = params.end_token_ids(eos_token_ids)
    if params.min_tokens and end_ids:
        found.append(NoEndBefore(params.min_tokens, end_ids))
    return tuple(found)


def process(logits: Tensor, places: Sequence[Place]) -> tuple[Tensor, dict[int, Exception]]:
    """Logits as the processors leave them: a copy on the same device, or the tensor given if there are no processors.

    The tensor given is never written to: the model's logits stay as they are for whoever reads them. Only rows that are
    processed come to main memory, and one that is not finite stays as it is.

    Args:
        logits: float32 `[places, vocabulary]`.

    Returns:
        The logits, and by row the error of a processor that failed.
    """
    failed: dict[int, Exception] = {}
    processors = [request.processors for request, _ in places]
    if not any(processors):
        return logits, failed
    indices = [index for index, some in enumerate(processors) if some]
    is_all = len(indices) == len(places)
    rows = logits.detach().clone() if is_all else logits[indices]
    processed = rows.cpu().numpy()
    for row, index in zip(processed, indices, strict=True):
        request, proposed_ids = places[index]
        if not np.isfinite(row).all():
            continue
        try:
            for processor in request.processors:
                processor.apply(row, request, proposed_ids)
        except Exception as error:
            failed[index] = error
    rows = torch.from_numpy(processed).to(logits.device)
    if is_all:
        return rows, failed
    result = logits.clone()
    result[indices] = rows
    return result, failed
