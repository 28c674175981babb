"""All operators together, as a backend has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.kernels.backends.reference.operators.attention import index_scores, paged_attention
from amalgam.kernels.backends.reference.operators.cache import write_kv
from amalgam.kernels.backends.reference.operators.elementwise import (
    add_rms_norm,
    gated,
    gelu,
    layer_norm,
    part_pairs,
    rms_norm,
    rotate,
    sigmoid,
    softplus,
)
from amalgam.kernels.backends.reference.operators.experts import expert_outputs, moe, route, weighted_sum
from amalgam.kernels.backends.reference.operators.products import embedding, linear, per_head
from amalgam.kernels.backends.reference.operators.recurrent import convolve, decay, delta_rule, scan_states
from amalgam.kernels.backends.reference.routing import choose_experts
from amalgam.kernels.program import Route
from amalgam.kernels.step import CachedAttention
from amalgam.kernels.weights import PackedWeight


class Operators:
    """What the interpreter computes with: this package's functions. A backend may put compiled ones in their place."""

    embedding = staticmethod(embedding)
    linear = staticmethod(linear)
    per_head = staticmethod(per_head)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    layer_norm = staticmethod(layer_norm)
    route = staticmethod(route)
    moe = staticmethod(moe)
    expert_outputs = staticmethod(expert_outputs)
    weighted_sum = staticmethod(weighted_sum)
    rotate = staticmethod(rotate)
    sigmoid = staticmethod(sigmoid)
    gelu = staticmethod(gelu)
    gated = staticmethod(gated)
    convolve = staticmethod(convolve)
    decay = staticmethod(decay)
    softplus = staticmethod(softplus)
    delta_rule = staticmethod(delta_rule)
    scan_states = staticmethod(scan_states)
    write_kv = staticmethod(write_kv)
    paged_attention = staticmethod(paged_attention)
    index_scores = staticmethod(index_scores)

    @classmethod
    def choose_experts(cls, scores: Tensor, one: Route) -> tuple[Tensor, Tensor]:
        """See `routing.choose_experts`."""
        return choose_experts(scores, one, cls.sigmoid)

    @classmethod
    def linears(
        cls, x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        """`linear` of the same rows with several weights."""
        biases = (None,) * len(weights) if biases is None else biases
        return [cls.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]

    @classmethod
    def cached_attention(cls, query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> Tensor:
        """Norm and rotate the heads, write keys and values to the cache, attend over it.

        query, key, value: projections, `[tokens, heads × d]`, `[tokens, kv_heads × d]` and `[tokens, kv_heads × v]`.
        Returns `[tokens, heads × v]` in query's type.
        """
        tokens, cache, dim = query.shape[0], how.cache, how.cache.keys.shape[2]
        queries, new_keys = query.view(tokens, -1, dim), key.view(tokens, -1, dim)
        for place in (cls._rotated, cls._normed) if how.norms_last else (cls._normed, cls._rotated):
            queries, new_keys = place(queries, new_keys, how)
        cls.write_kv(cache, new_keys, value.view(tokens, *cache.values.shape[1:]), how.slot_ids)
        return cls.paged_attention(queries, cache, how.batch, **how.options).flatten(1)

    @classmethod
    def _normed(cls, queries: Tensor, keys: Tensor, how: CachedAttention) -> tuple[Tensor, Tensor]:
        if how.norms is None:
            return queries, keys
        kind = torch.float32 if how.rounds_last else queries.dtype
        normed = (
            cls.rms_norm(x.to(kind), weight, how.norm_eps).to(x.dtype)
            for x, weight in zip((queries, keys), how.norms, strict=True)
        )
        return next(normed), next(normed)

    @classmethod
    def _rotated(cls, queries: Tensor, keys: Tensor, how: CachedAttention) -> tuple[Tensor, Tensor]:
        if how.rotary is None:
            return queries, keys
        if how.is_interleaved:
            width = 2 * how.rotary[0].shape[1]
            queries, keys = part_pairs(queries, width), part_pairs(keys, width)
        return cls.rotate(queries, *how.rotary), cls.rotate(keys, *how.rotary)
