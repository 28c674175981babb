"""Logits → token ids.

In: float32 logits, one row for each request. Out: each request's next token, or why it has none.
Must never know: the model, the step, other requests' logits.

A token depends on its own logits, the request's parameters and seed, and its place in the answer, never on what
shares the step. Work over the whole vocabulary is done for all rows at once, with operations that give each row the
same bits in any company; what remains are a request's candidates, which are chosen from by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from amalgam.engine.request import Request, SamplingParams, StepResult
from amalgam.errors import AmalgamError


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
    is_finite = torch.isfinite(logits).all(dim=1).tolist()
    chosen = logits.argmax(dim=1).tolist()
    for row, token_id in _sample_rows(logits, requests, is_finite):
        chosen[row] = token_id
    return StepResult(
        {request.request_id: chosen[row] for row, request in enumerate(requests) if is_finite[row]},
        {request.request_id: _non_finite(request) for row, request in enumerate(requests) if not is_finite[row]},
    )


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
        order = np.argsort(weights, kind="stable")
        cumulative = np.cumsum(weights[order])
        is_tail = cumulative <= (1.0 - params.top_p) * cumulative[-1]
        is_tail[-1] = False
        weights[order[is_tail]] = 0.0
    if params.min_p > 0.0:
        weights[weights < params.min_p] = 0.0  # the best has weight 1
    cumulative = np.cumsum(weights)
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return min(index, int(np.flatnonzero(weights)[-1]))


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
    return logits.index_put((row_ids, token_ids), penalized)  # a token that occurred twice is written the same twice


def _sample_rows(logits: Tensor, requests: Sequence[Request], is_finite: Sequence[bool]) -> list[tuple[int, int]]:
    """(row, token id) of the requests that are not greedy."""
    rows = [row for row, request in enumerate(requests) if is_finite[row] and not request.params.is_greedy]
    if not rows:
        return []
    logits = logits[rows]
    vocab_size = logits.shape[1]
    top_k = [min(requests[row].params.top_k or vocab_size, vocab_size) for row in rows]
    thresholds = _thresholds(logits, top_k)
    sampled = []
    for row, scores, threshold in zip(rows, logits.cpu().numpy(), thresholds, strict=True):
        request = requests[row]
        # All tokens that are as good as the k-th, as in transformers: ties then need no order.
        token_ids = np.flatnonzero(scores >= threshold)
        u = uniform(request.seed, request.num_new_tokens)
        sampled.append((row, int(token_ids[choose(scores[token_ids].astype(np.float64), request.params, u)])))
    return sampled


def _thresholds(logits: Tensor, top_k: Sequence[int]) -> list[float]:
    """The k-th largest logit of each row; -inf where k is the whole vocabulary."""
    vocab_size = logits.shape[1]
    limits = [-np.inf] * len(top_k)
    limited = [row for row, k in enumerate(top_k) if k < vocab_size]
    if limited:
        kth = torch.tensor([[top_k[row] - 1] for row in limited], device=logits.device)
        largest = logits[limited].topk(int(kth.max()) + 1, dim=1).values
        for row, value in zip(limited, largest.gather(1, kth)[:, 0].tolist(), strict=True):
            limits[row] = value
    return limits


def _non_finite(request: Request) -> NonFiniteLogitsError:
    return NonFiniteLogitsError(
        f"The model computed NaN or infinity for token {request.num_new_tokens} of the answer.",
        remedy="A damaged weight, or a dtype too narrow for it: check the sources, or set inference.dtype to float32.",
    )
