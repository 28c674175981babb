"""Logits → token ids.

In: float32 logits, one row for each request. Out: each request's next token, or why it has none.
Must never know: the model, the step, other requests' logits.

A token depends on its own logits, the request's parameters and seed, and its place in the answer, never on what
shares the step. In the extension each row is chosen from by itself. Without it, work over the whole vocabulary is
done for all rows at once, with operations that give each row the same bits in any company.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.engine.request import Request, SamplingParams, StepResult
from amalgam.errors import AmalgamError
from amalgam.kernels import native


class NonFiniteLogitsError(AmalgamError):
    """The model computed NaN or infinity."""

    http_status = 500
    exit_code = 1
    code = "non_finite_logits"


def sample(logits: Tensor, requests: Sequence[Request]) -> StepResult:
    """Choose the next token of each request.

    The order is that of transformers: repetition penalty over prompt and answer, temperature, top_k, top_p, min_p.

    Args:
        logits: float32 `[requests, vocabulary]`.
        requests: in the order of the rows.
    """
    logits = _penalize(logits, requests)
    is_compiled = logits.is_cpu and native.is_available()
    token_ids = _sample_compiled(logits, requests) if is_compiled else _sample(logits, requests)
    request_ids = [request.request_id for request in requests]
    if -1 not in token_ids:
        return StepResult(dict(zip(request_ids, token_ids, strict=True)), {})
    return StepResult(
        {request_id: token_id for request_id, token_id in zip(request_ids, token_ids, strict=True) if token_id >= 0},
        {r.request_id: _non_finite(r) for r, token_id in zip(requests, token_ids, strict=True) if token_id < 0},
    )


def _sample_compiled(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """`_sample` in the extension, all rows in one call."""
    return native.draw(logits, [(request.params.draw, request.seed, request.num_new_tokens) for request in requests])


def _sample(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each request; -1 where a logit is not finite."""
    is_finite = (logits.amax(dim=1).isfinite() & logits.amin(dim=1).isfinite()).tolist()  # both let NaN through
    token_ids = [-1] * len(requests)
    greedy = [row for row, request in enumerate(requests) if is_finite[row] and request.params.is_greedy]
    if greedy:
        for row, token_id in zip(greedy, _rows(logits, greedy).argmax(dim=1).tolist(), strict=True):
            token_ids[row] = token_id
    drawn = [row for row, request in enumerate(requests) if is_finite[row] and not request.params.is_greedy]
    if drawn:
        for row, token_id in zip(drawn, _draw(_rows(logits, drawn), [requests[row] for row in drawn]), strict=True):
            token_ids[row] = token_id
    return token_ids


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


def _penalize(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Divide positive and multiply negative logits of tokens that occurred (Keskar et al., 2019)."""
    rows = [row for row, request in enumerate(requests) if request.params.repetition_penalty != 1.0]
    if not rows:
        return logits
    num_tokens = torch.tensor([len(requests[row].token_ids) for row in rows])
    row_ids = torch.tensor(rows).repeat_interleave(num_tokens).to(logits.device)
    token_ids = torch.cat([torch.tensor(requests[row].token_ids) for row in rows]).to(logits.device)
    penalties = torch.tensor([request.params.repetition_penalty for request in requests], device=logits.device)[row_ids]
    scores = logits[row_ids, token_ids]
    penalized = torch.where(scores < 0, scores * penalties, scores / penalties)
    # A parameter must not turn what the model computed into infinity, nor hide it if the model did.
    largest = torch.finfo(logits.dtype).max
    penalized = torch.where(scores.isfinite(), penalized.clamp(-largest, largest), scores)
    return logits.index_put((row_ids, token_ids), penalized)  # a token that occurred twice is written the same twice


def _rows(logits: Tensor, rows: Sequence[int]) -> Tensor:
    return logits if len(rows) == len(logits) else logits[rows]


def _draw(logits: Tensor, requests: Sequence[Request]) -> list[int]:
    """The next token of each request, none of them greedy."""
    vocab_size = logits.shape[1]
    thresholds = _thresholds(logits, [min(request.params.top_k or vocab_size, vocab_size) for request in requests])
    token_ids = []
    for request, scores, threshold in zip(requests, logits.cpu().numpy(), thresholds, strict=True):
        # All tokens that are as good as the k-th, as in transformers: ties then need no order.
        candidates = np.flatnonzero(scores >= threshold)
        u = uniform(request.seed, request.num_new_tokens)
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
