"""The choice of next tokens on the card: a row's logits stay there, and one number for each row comes back.

In: logits and what each row wants. Out: token ids. Must never know: requests, the step.

The meaning is `amalgam.engine.sampler`'s: tokens below the k-th largest logit go first, then those of least weight
that together hold at most 1 - top_p, of equal ones those with smaller ids, then those below min_p times the best; the
number `u` picks from what is left in the order of ids. Where a boundary lies is found by halving, with logits as
integers in the order of the floats, so that nothing is sorted. Weights are float32, as cards are slow at wider ones;
their sums have a fixed order, so that a row's token does not depend on the others. From the host's they differ in
float32's last bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.backends.triton.launching import on_device_of, runs_on
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.routing import order_of
from amalgam.kernels.backends.triton.variants import Variant

_BLOCK = 4096
_WARPS = 16
_LEAST = tl.constexpr(-(2**31))


def supports(logits: Tensor) -> bool:
    """Whether `draw` takes these logits."""
    return runs_on(logits) and logits.dtype is torch.float32 and logits.dim() == 2


def draw(logits: Tensor, rows: Sequence[tuple[int, float, float, float, float]]) -> list[int]:
    """The next token of each row of logits, float32 `[rows, vocabulary]`; -1 where one is not finite.

    rows: top_k (0: all), temperature (0: the first of the largest logits), top_p, min_p, and u in [0, 1).
    """
    if not rows:
        return []
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    vocabulary = logits.shape[1]
    parameters = torch.tensor(rows, dtype=torch.float64).to(logits.device)
    ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    with on_device_of(logits):
        draw_rows[(len(rows),)](
            logits,
            parameters,
            ids,
            logits.stride(0),
            vocabulary,
            BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
            num_warps=_WARPS,
            **OPTIONS,
        )
    return ids.tolist()


@triton.jit
def scores_at(row, start, vocabulary, BLOCK: tl.constexpr):
    """A stretch of a row, and which of it there is."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(row + column, column < vocabulary, float("-inf")), column < vocabulary


@triton.jit
def weights_of(score, is_there, best, temperature):
    """exp((score - best) / temperature), 0 for what there is not."""
    return tl.where(is_there, tl.exp((score - best) / temperature), 0.0)


@triton.jit
def middle(low, high):
    """Between two integers, without overflow."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def draw_rows(logits, parameters, ids, stride, vocabulary, BLOCK: tl.constexpr):
    """The token of one row."""
    which = tl.program_id(0).to(tl.int64)
    row = logits + which * stride
    top_k = tl.load(parameters + which * 5).to(tl.int32)
    wide = tl.load(parameters + which * 5 + 1)
    temperature = tl.where(wide > 0.0, tl.maximum(wide, 1e-37), 0.0).to(tl.float32)  # what is not 0 does not become it
    top_p = tl.load(parameters + which * 5 + 2)
    min_p = tl.load(parameters + which * 5 + 3).to(tl.float32)
    u = tl.load(parameters + which * 5 + 4)

    # The largest logit and its first place; whether all are finite.
    best_order = tl.full((), _LEAST, tl.int32)
    best_id = tl.full((), 0, tl.int32)
    bad = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        score, is_there = scores_at(row, start, vocabulary, BLOCK)
        is_bad = is_there & ((score != score) | (tl.abs(score) == float("inf")))
        bad = tl.maximum(bad, tl.max(is_bad.to(tl.int32), 0))
        order = tl.where(is_there, order_of(score), _LEAST)
        largest = tl.max(order, 0)
        first = tl.argmax(order, 0) + start
        best_id = tl.where(largest > best_order, first, best_id)
        best_order = tl.maximum(best_order, largest)
    if bad > 0:
        tl.store(ids + which, tl.full((), -1, tl.int64))
        return
    if temperature == 0.0:
        tl.store(ids + which, best_id.to(tl.int64))
        return

    # The k-th largest: the least bound that fewer than k logits exceed.
    least = tl.full((), _LEAST, tl.int32)
    if (top_k > 0) & (top_k < vocabulary):
        high = best_order
        while least < high:
            bound = middle(least, high)
            count = tl.full((), 0, tl.int32)
            for start in range(0, vocabulary, BLOCK):
                score, is_there = scores_at(row, start, vocabulary, BLOCK)
                count += tl.sum((is_there & (order_of(score) > bound)).to(tl.int32), 0)
            is_enough = count < top_k
            high = tl.where(is_enough, bound, high)
            least = tl.where(is_enough, least, bound + 1)

    best = tl.load(row + best_id)
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, vocabulary, BLOCK):
        score, is_there = scores_at(row, start, vocabulary, BLOCK)
        total += tl.sum(weights_of(score, is_there & (order_of(score) >= least), best, temperature), 0).to(tl.float64)

    # The least bound up to which the logits hold more than what top_p leaves out; of those at the bound, so many go.
    num_gone = tl.full((), 0, tl.int32)
    if top_p < 1.0:
        limit = (1.0 - top_p) * total
        low, high = least, best_order
        while low < high:
            bound = middle(low, high)
            held = tl.full((), 0.0, tl.float64)
            for start in range(0, vocabulary, BLOCK):
                score, is_there = scores_at(row, start, vocabulary, BLOCK)
                order = order_of(score)
                held += tl.sum(
                    weights_of(score, is_there & (order >= least) & (order <= bound), best, temperature), 0
                ).to(tl.float64)
            is_more = held > limit
            high = tl.where(is_more, bound, high)
            low = tl.where(is_more, low, bound + 1)
        below = tl.full((), 0.0, tl.float64)
        at_bound = tl.full((), 0, tl.int32)
        weight = tl.full((), 0.0, tl.float32)
        for start in range(0, vocabulary, BLOCK):
            score, is_there = scores_at(row, start, vocabulary, BLOCK)
            order = order_of(score)
            weights = weights_of(score, is_there & (order >= least), best, temperature)
            below += tl.sum(tl.where(order < high, weights, 0.0), 0).to(tl.float64)
            at_bound += tl.sum((is_there & (order == high)).to(tl.int32), 0)
            weight = tl.maximum(weight, tl.max(tl.where(is_there & (order == high), weights, 0.0), 0))
        room = tl.maximum(limit - below, 0.0) / tl.where(weight > 0.0, weight, 1.0).to(tl.float64)
        num_gone = tl.minimum(room, at_bound.to(tl.float64)).to(tl.int32)
        num_gone = tl.minimum(num_gone, at_bound - (high == best_order).to(tl.int32))  # never all
        least = high

    # What is left, in the order of ids: the first whose running sum exceeds u × the sum, or the last with a weight.
    left = tl.full((), 0.0, tl.float64)
    gone = tl.full((), 0, tl.int32)
    for start in range(0, vocabulary, BLOCK):
        weights, gone = left_at(row, start, vocabulary, least, num_gone, gone, min_p, best, temperature, BLOCK)
        left += tl.sum(weights, 0).to(tl.float64)
    target = u * left
    passed = tl.full((), 0.0, tl.float64)
    gone = tl.full((), 0, tl.int32)
    chosen = tl.full((), -1, tl.int32)
    last = best_id
    for start in range(0, vocabulary, BLOCK):
        weights, gone = left_at(row, start, vocabulary, least, num_gone, gone, min_p, best, temperature, BLOCK)
        lane = tl.arange(0, BLOCK)
        is_over = (passed + tl.cumsum(weights, 0).to(tl.float64) > target) & (weights > 0.0)
        first = tl.min(tl.where(is_over, lane, BLOCK), 0)
        chosen = tl.where((chosen < 0) & (first < BLOCK), start + first, chosen)
        final = tl.max(tl.where(weights > 0.0, lane, -1), 0)
        last = tl.where(final >= 0, start + final, last)
        passed += tl.sum(weights, 0).to(tl.float64)
    tl.store(ids + which, tl.where(chosen < 0, last, chosen).to(tl.int64))


@triton.jit
def left_at(row, start, vocabulary, least, num_gone, gone, min_p, best, temperature, BLOCK: tl.constexpr):
    """Weights that a stretch keeps, and how many at the bound have gone up to its end."""
    score, is_there = scores_at(row, start, vocabulary, BLOCK)
    order = order_of(score)
    at_bound = (is_there & (order == least)).to(tl.int32)
    rank = gone + tl.cumsum(at_bound, 0)
    is_kept = is_there & (order >= least) & ((at_bound == 0) | (rank > num_gone))
    weights = weights_of(score, is_kept, best, temperature)
    return tl.where(weights < min_p, 0.0, weights), gone + tl.sum(at_bound, 0)


VARIANTS = (
    Variant(
        "draw",
        draw_rows,
        {"logits": "*fp32", "parameters": "*fp64", "ids": "*i64", "stride": "i32", "vocabulary": "i32"},
        {"BLOCK": _BLOCK},
        _WARPS,
    ),
)
