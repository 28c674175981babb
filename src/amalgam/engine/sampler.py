"""Logits → token ids.

In: float32 logits, a row for each place that wants a token. Out: each request's new tokens, or why it has none.
Must never know: the model, other requests' logits.

A token depends on its own logits, the request's parameters and seed, and its place in the answer, never on what
shares the step. In the extension, and in a GPU's kernels, each row is chosen from by itself. Without them, work over
the whole vocabulary is done for all rows at once, with operations that give each row the same bits in any company.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.engine.logits import Place, process
from amalgam.engine.params import SamplingParams
from amalgam.engine.request import NewTokens, Request, ScheduledRequest, StepResult, TokenLogprobs
from amalgam.errors import AmalgamError
from amalgam.kernels.backends import why_no_triton
from amalgam.kernels.backends.cpu import extension, sampling


class NonFiniteLogitsError(AmalgamError):
    """The model computed NaN or infinity."""

    http_status = 500
    exit_code = 1
    code = "non_finite_logits"


class SamplingOnCard(Protocol):
    """`amalgam.kernels.backends.triton.sampling`."""

    def supports(self, logits: Tensor) -> bool: ...

    def draw(self, logits: Tensor, rows: Sequence[tuple[int, float, float, float, float]]) -> list[int]: ...


def sample(logits: Tensor, items: Sequence[ScheduledRequest]) -> StepResult:
    """Choose the next tokens of each request.

    The order is that of transformers: the request's processors, temperature, top_k, top_p, min_p. Proposals come true
    as long as they are what would have been chosen without them, so that they change no answer.

    Args:
        logits: float32 `[places, vocabulary]`; never written to.
        items: in the order of the rows, `num_logits` rows each.
    """
    places: list[Place] = []  # what the rows of logits are for
    for item in items:
        places.append((item.request, ()))
        if proposed_ids := item.proposed_ids:
            places += [(item.request, proposed_ids[: count + 1]) for count in range(len(proposed_ids))]
    processed, failed = process(logits, places)
    token_ids = choose_tokens(processed, places)
    for row in failed:  # a processor may have left it half changed
        token_ids[row] = -1
    tokens: dict[int, NewTokens] = {}
    errors: dict[int, Exception] = {}
    row = 0
    for item in items:
        request, proposed_ids = item.request, item.proposed_ids
        chosen = _verify(token_ids[row:], proposed_ids) if proposed_ids else (token_ids[row],)
        if chosen[0] < 0:
            errors[request.request_id] = failed[row] if row in failed else _non_finite(request)
        elif request.params.logprobs is None:
            tokens[request.request_id] = NewTokens(chosen)
        else:
            logprobs = logprobs_of(logits[row : row + len(chosen)], chosen, request.params.logprobs)
            tokens[request.request_id] = NewTokens(chosen, tuple(logprobs))
        row += 1 + len(proposed_ids)
    return StepResult(tokens, errors)


def choose_tokens(logits: Tensor, places: Sequence[Place]) -> list[int]:
    """The token of each place; -1 where a logit is not finite."""
    if logits.is_cpu and extension.is_available():
        return sampling.draw(  # all rows in one call
            logits, [(request.params.draw, request.seed, request.num_new_tokens + len(ids)) for request, ids in places]
        )
    on_card = sampling_on_card(logits.device)
    if on_card is None or not on_card.supports(logits):
        return _choose(logits, places)
    numbers = (uniform(request.seed, request.num_new_tokens + len(ids)) for request, ids in places)
    return on_card.draw(logits, [(*request.params.draw, u) for (request, _), u in zip(places, numbers, strict=True)])


@functools.cache
def sampling_on_card(device: torch.device) -> SamplingOnCard | None:
    """The GPU's kernels, where a model on this device runs them."""
    if why_no_triton(device) is not None:
        return None
    from amalgam.kernels.backends.triton import sampling as on_card

    return on_card


def _choose(logits: Tensor, places: Sequence[Place]) -> list[int]:
    is_finite = (logits.amax(dim=1).isfinite() & logits.amin(dim=1).isfinite()).tolist()  # both let NaN through
    token_ids = [-1] * len(places)
    greedy = [row for row, (request, _) in enumerate(places) if is_finite[row] and request.params.is_greedy]
    if greedy:
        for row, token_id in zip(greedy, _rows(logits, greedy).argmax(dim=1).tolist(), strict=True):
            token_ids[row] = token_id
    drawn = [row for row, (request, _) in enumerate(places) if is_finite[row] and not request.params.is_greedy]
    if drawn:
        for row, token_id in zip(drawn, _draw(_rows(logits, drawn), [places[row] for row in drawn]), strict=True):
            token_ids[row] = token_id
    return token_ids


def _verify(chosen: Sequence[int], proposed_ids: Sequence[int]) -> tuple[int, ...]:
    """The chosen tokens up to the first that is not the proposed one: those behind it follow what did not come true."""
    count = 1
    while count <= len(proposed_ids) and chosen[count - 1] == proposed_ids[count - 1] and chosen[count] >= 0:
        count += 1
    return tuple(chosen[:count])


def logprobs_of(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """Of one token for each row, and of each row's likeliest. Among equals the smaller id comes first.

    Args:
        logits: finite, float32 `[tokens, vocabulary]`, as the model gave them.
    """
    scores = logits.log_softmax(dim=1)
    chosen = scores.gather(1, torch.tensor(token_ids, device=scores.device)[:, None])[:, 0].tolist()
    num_top = min(num_top, scores.shape[1])
    if not num_top:
        return [TokenLogprobs(value, ()) for value in chosen]
    is_likely = scores >= scores.topk(num_top, dim=1).values[:, -1:]  # all that are as good as the last
    found = []
    for row, value, likely in zip(scores.cpu().numpy(), chosen, is_likely.cpu().numpy(), strict=True):
        ids = np.flatnonzero(likely)
        ids = ids[np.argsort(-row[ids], kind="stable")][:num_top]
        found.append(TokenLogprobs(value, tuple(zip(ids.tolist(), row[ids].tolist(), strict=True))))
    return found


def uniform(seed: int, index: int) -> float:
    """The number in [0, 1) that chooses token `index` of an answer: Philox 4×64, keyed by both (Salmon et al., 2011).

    A counter in place of a state, so that a request computed again draws the same.
    """
    raw = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def choose(scores: npt.NDArray[np.float64], params: SamplingParams, u: float) -> int:
    """Index of the candidate at quantile `u` of the distribution that temperature, top_p and min_p leave.

    Args:
        scores: finite logits `[candidates]`, in the order of token ids.
        u: in [0, 1).
    """
    with np.errstate(over="ignore"):  # a tiny temperature: all but the best get weight 0
        weights = np.exp((scores - scores.max()) / params.temperature)
    if params.top_p < 1.0:
        weights[_tail(weights, 1.0 - params.top_p)] = 0.0
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0  # the best has weight 1
    cumulative = np.cumsum(weights)
    total = cumulative[-1]
    last = np.searchsorted(cumulative, total)  # where rounding up may lead, and no further
    return int(min(np.searchsorted(cumulative, u * total, side="right"), last))


def _tail(weights: npt.NDArray[np.float64], share: float) -> npt.NDArray[np.int64]:
    """The candidates of least weight that together hold at most `share` of it, never all of them."""
    limit = share * weights.sum()
    # Together within the limit, so they need no sorting; the likeliest stays whatever is rounded.
    is_negligible = (weights <= limit / len(weights)) & (weights < weights.max())
    others = np.flatnonzero(~is_negligible)
    others = others[np.argsort(weights[others], kind="stable")]
    cumulative = weights[is_negligible].sum() + np.cumsum(weights[others])
    num_more = min(int(np.searchsorted(cumulative, limit, side="right")), len(others) - 1)
    return np.concatenate((np.flatnonzero(is_negligible), others[:num_more]))


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _draw(logits: Tensor, places: Sequence[Place]) -> list[int]:
    """The token of each place, none of them greedy."""
    vocab_size = logits.shape[1]
    thresholds = _thresholds(logits, [min(request.params.top_k or vocab_size, vocab_size) for request, _ in places])
    token_ids = []
    for (request, proposed_ids), scores, threshold in zip(places, logits.cpu().numpy(), thresholds, strict=True):
        # All tokens that are as good as the k-th, as in transformers: ties then need no order.
        candidates = np.flatnonzero(scores >= threshold)
        u = uniform(request.seed, request.num_new_tokens + len(proposed_ids))
        token_ids.append(int(candidates[choose(scores[candidates].astype(np.float64), request.params, u)]))
    return token_ids


def _thresholds(logits: Tensor, top_k: Sequence[int]) -> list[float]:
    """The k-th largest logit of each row; -inf where k is the whole vocabulary."""
    vocab_size = logits.shape[1]
    limits = [-np.inf] * len(top_k)
    limited = [row for row, k in enumerate(top_k) if k < vocab_size]
    if limited:
        kth = torch.tensor([[top_k[row] - 1] for row in limited], device=logits.device)
        largest = _rows(logits, limited).topk(int(kth.max()) + 1, dim=1).values
        for row, value in zip(limited, largest.gather(1, kth)[:, 0].tolist(), strict=True):
            limits[row] = value
    return limits


def _non_finite(request: Request) -> NonFiniteLogitsError:
    return NonFiniteLogitsError(
        f"The model computed NaN or infinity for token {request.num_new_tokens} of the answer.",
        remedy="A damaged weight, or a dtype too narrow for it: check the sources, or set inference.dtype to float32.",
    )
