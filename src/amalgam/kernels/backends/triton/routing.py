"""Scores of experts → which of them a token goes to: one program for a token, whatever the scoring.

In: a router's scores. Out: ids and weights, as `reference.routing` says. Must never know: experts' weights, layers.

Experts lie as `[groups, size of a group]`, both padded to powers of two. What is compared are integers in the order of
the floats: NaN is above all, and what is taken or padding below -∞, so that every id is that of an expert, and none
comes twice. Of equal scores the smaller id comes first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.backends.triton.launching import on_device_of, power_of_two, runs_on
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.variants import Variant
from amalgam.kernels.program import Route

_SCORINGS = ("softmax", "sigmoid", "chosen", "apart", "mixer")
_MOST_EXPERTS = 4096
_LEAST = tl.constexpr(-(2**31))
_SOFTMAX, _SIGMOID, _CHOSEN, _APART, _MIXER = (tl.constexpr(index) for index in range(len(_SCORINGS)))


def supports(scores: Tensor) -> bool:
    """Whether `choose_experts` takes these scores."""
    return runs_on(scores) and scores.dtype is torch.float32 and takes(scores.shape[1])


def takes(num_experts: int) -> bool:
    """Whether `choose_experts` chooses among so many."""
    return 0 < num_experts <= _MOST_EXPERTS


def choose_experts(scores: Tensor, one: Route) -> tuple[Tensor, Tensor]:
    """See `reference.routing.choose_experts`."""
    scores = scores.contiguous()
    tokens, experts = scores.shape
    ids = torch.empty((tokens, one.k), dtype=torch.int64, device=scores.device)
    weights = torch.empty((tokens, one.k), dtype=torch.float32, device=scores.device)
    if tokens:
        size = experts // one.num_groups
        blocks = power_of_two(one.num_groups), power_of_two(size)
        with on_device_of(scores):
            choose[(tokens,)](
                scores,
                None if one.correction is None else one.correction.contiguous(),
                None if one.factors is None else one.factors.contiguous(),
                ids,
                weights,
                one.sum_eps,
                one.scaling,
                2 * one.jitter,
                GROUPS=one.num_groups,
                SIZE=size,
                BLOCK_GROUPS=blocks[0],
                BLOCK_SIZE=blocks[1],
                KEPT=one.num_kept,
                K=one.k,
                BLOCK_K=power_of_two(one.k),
                SCORING=_SCORINGS.index(one.scoring),
                NORMALISES=one.normalises,
                num_warps=1 if blocks[0] * blocks[1] <= 256 else 4,
                **OPTIONS,
            )
    return ids, weights


@triton.jit
def order_of(x):
    """float32 → int32 in the same order: NaN above ∞, and both zeros equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FC00000)


@triton.jit
def choose(
    scores,
    correction,
    factors,
    ids,
    weights,
    sum_eps,
    scaling,
    reach,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCORING: tl.constexpr,
    NORMALISES: tl.constexpr,
):
    """The experts of one token."""
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, BLOCK_GROUPS)[:, None], tl.arange(0, BLOCK_SIZE)[None, :]
    expert = group * SIZE + member
    is_expert = (group < GROUPS) & (member < SIZE)
    score = tl.load(scores + token * (GROUPS * SIZE) + expert, is_expert, float("-inf"))
    if SCORING == _SOFTMAX:
        powers = tl.exp(score - tl.max(tl.max(score, 1), 0))
        score = powers / tl.sum(tl.sum(powers, 1), 0)
    if SCORING == _SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-score))
    choice = score
    if correction is not None:
        choice += tl.load(correction + expert, is_expert, 0.0).to(tl.float32)

    if KEPT < GROUPS:
        order = tl.where(is_expert, order_of(choice), _LEAST)
        first = tl.argmax(order, 1, keep_dims=True)
        worth = tl.sum(tl.where(member == first, choice, 0.0), 1, keep_dims=True)
        if SCORING == _SIGMOID and SIZE > 1:
            second = tl.argmax(tl.where(member == first, _LEAST, order), 1, keep_dims=True)
            worth += tl.sum(tl.where(member == second, choice, 0.0), 1, keep_dims=True)
        order_of_group = tl.where(group < GROUPS, order_of(worth), _LEAST)
        is_kept = group < 0
        for _ in range(KEPT):
            found = tl.argmax(tl.where(is_kept, _LEAST, order_of_group), 0, keep_dims=True)
            is_kept = is_kept | (group == found)
        choice = tl.where(is_kept, choice, 0.0 if SCORING == _SOFTMAX else float("-inf"))

    COUNT: tl.constexpr = BLOCK_GROUPS * BLOCK_SIZE
    order = tl.reshape(tl.where(is_expert, order_of(choice), _LEAST), (COUNT,))
    score = tl.reshape(score, (COUNT,))
    lane = tl.arange(0, COUNT)
    slot = tl.arange(0, BLOCK_K)
    weight = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    chosen = tl.zeros((BLOCK_K,), tl.int32)
    for index in range(K):
        best = tl.argmax(order, 0)
        its_score = tl.sum(tl.where(lane == best, score, 0.0), 0)
        if SCORING == _MIXER:
            distance = (its_score - score) / tl.maximum(tl.abs(score), its_score)
            is_near = (order > _LEAST) & ~(distance > reach)
            its_score = 1.0 / tl.sum(tl.where(is_near, tl.exp(score - its_score), 0.0), 0)
        weight = tl.where(slot == index, its_score, weight)
        chosen = tl.where(slot == index, best // BLOCK_SIZE * SIZE + best % BLOCK_SIZE, chosen)
        order = tl.where(lane == best, _LEAST, order)

    is_slot = slot < K
    if SCORING == _CHOSEN:
        weight = tl.exp(weight - tl.max(weight, 0))
        weight = weight / tl.sum(weight, 0)
    if SCORING == _APART:
        weight = 1.0 / (1.0 + tl.exp(-weight))
    if SCORING != _MIXER:
        if NORMALISES:
            weight = weight / (tl.sum(tl.where(is_slot, weight, 0.0), 0) + sum_eps)
        weight *= scaling
        if factors is not None:
            weight *= tl.load(factors + chosen, is_slot, 0.0).to(tl.float32)
    tl.store(ids + token * K + slot, chosen.to(tl.int64), is_slot)
    tl.store(weights + token * K + slot, weight, is_slot)


def _variants() -> Iterator[Variant]:
    types = {"scores": "*fp32", "ids": "*i64", "weights": "*fp32"} | dict.fromkeys(
        ("sum_eps", "scaling", "reach"), "fp32"
    )
    sizes = {"GROUPS": 1, "SIZE": 128, "BLOCK_GROUPS": 1, "BLOCK_SIZE": 128, "KEPT": 1, "K": 8, "BLOCK_K": 8}
    how = {"SCORING": _SCORINGS.index("softmax"), "NORMALISES": True, "correction": None, "factors": None}
    yield Variant("choose/qwen3", choose, types, {**sizes, **how}, 1)
    sizes |= {"GROUPS": 8, "SIZE": 32, "BLOCK_GROUPS": 8, "BLOCK_SIZE": 32, "KEPT": 4}
    how = {"SCORING": _SCORINGS.index("sigmoid"), "NORMALISES": True, "factors": None}
    yield Variant("choose/deepseek_v3", choose, {**types, "correction": "*fp32"}, {**sizes, **how}, 1)


VARIANTS = tuple(_variants())
