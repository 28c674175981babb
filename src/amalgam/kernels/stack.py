"""Decoder layers one after the other in one call of the extension.

In: the weights of standard layers, all in panels. Out: a `Stack` that runs them and gives, bit for bit, what the
operators of `amalgam.kernels.ops` give one by one. Must never know: names, plans, requests.

Between two products a layer's many small calls would fetch Python's code and data back into caches that the weights
have just filled: with one sequence that was a fifth of a step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.kernels import attention, native, panels
from amalgam.kernels.packed import Activation, AttentionBatch, ExpertTable, PackedWeight

if TYPE_CHECKING:
    from amalgam import _native

Projection = tuple[PackedWeight, Tensor | None]  # with its bias


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """Grouped-query attention as `ops.linears`, `ops.cached_attention` and `ops.linear` compute it."""

    projections: tuple[Projection, Projection, Projection, Projection]  # query, key, value, out
    head_norms: tuple[Tensor, Tensor] | None
    head_norm_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    sinks: Tensor | None
    rope: int | None  # which of the tables that `Stack.run` is given


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """SwiGLU MLP."""

    gate: Projection
    up: Projection
    down: Projection


@dataclass(frozen=True, eq=False)
class MixtureLayer:
    """Mixture of experts as `ops.route` and `ops.moe` compute it."""

    router: PackedWeight
    num_active: int
    normalises: bool
    sum_eps: float
    experts: ExpertTable
    activation: Activation


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    """x + attention(normed), its norm, + mlp of that, and the norm that comes next."""

    attention: AttentionLayer
    mlp: DenseLayer | MixtureLayer
    mlp_norm: Tensor
    next_norm: Tensor


@dataclass(frozen=True, eq=False)
class _Caches:
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    dtype: torch.dtype | None  # None: they are not such as a stack takes
    num_slots: int
    addresses: list[tuple[int, int]]


class Stack:
    """Layers that are run in one call. Keeps alive what it needs of them."""

    def __init__(self, layers: Sequence[DecoderLayer], norm_eps: float) -> None:
        """
        Raises:
            ValueError: `fits` does not hold.
        """
        from amalgam import _native

        if not fits(layers):
            raise ValueError("a stack needs its weights in panels, and float32 or bfloat16 beside them")
        self._layers = layers
        self._kept: list[Tensor] = []
        self._native = _native.Stack()
        self._caches: _Caches | None = None
        # By rope, the narrowest head that it turns.
        self._rope_limits: dict[int, int] = {}
        for part in (layer.attention for layer in layers):
            if part.rope is not None:
                self._rope_limits[part.rope] = min(part.head_dim, self._rope_limits.get(part.rope, part.head_dim))
        self._num_active = [layer.mlp.num_active for layer in layers if isinstance(layer.mlp, MixtureLayer)]
        for layer in layers:
            self._add(layer, norm_eps)

    def takes(self, x: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> bool:
        """Whether `run` takes these activations and caches."""
        return x.is_cpu and x.dtype in native.FLOAT_TYPES and self._bind(keys, values).dtype is x.dtype

    def run(
        self,
        x: Tensor,
        normed: Tensor,
        *,
        positions: Tensor,
        tables: Sequence[tuple[Tensor, Tensor]],
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        slot_ids: Tensor,
        batch: AttentionBatch,
    ) -> tuple[Tensor, Tensor]:
        """All layers; `x` and `normed` become the residual stream after the last one and its norm.

        Args:
            x, normed: `[tokens, hidden]`, both contiguous and of one type.
            positions, slot_ids: int64 `[tokens]`, contiguous.
            tables: cos and sin of all positions, float32 `[positions, r / 2]`, one pair for each rope.
            keys, values: each layer's cache, `[slots, kv_heads, head_dim]` of the type of x.

        Returns ids int64 and gate weights float32 of the experts, `[mixtures, tokens, k]`.

        Raises:
            ValueError: shapes or types that do not fit together.
            IndexError: a slot that the cache does not have, or a position that is not in the tables.
        """
        tokens, hidden = x.shape
        plan = attention.plan_of(batch)
        caches = self._bind(keys, values)
        if (
            not self.takes(x, keys, values)
            or normed.shape != x.shape
            or normed.dtype is not x.dtype
            or not (x.is_contiguous() and normed.is_contiguous())
            or hidden != self._layers[0].attention.projections[0][0].shape[1]
            or plan.num_tokens != tokens
            or plan.num_slots > caches.num_slots
            or not normed.is_cpu
            or not all(_is_index(ids, tokens) for ids in (slot_ids, positions))
            or not self._takes_tables(tables)
        ):
            raise ValueError(f"a stack of {len(self._layers)} layers cannot run {x.dtype} {tuple(x.shape)}")
        tables = [(cos.contiguous(), sin.contiguous()) for cos, sin in tables]
        k = self._num_active[0] if self._num_active else 0
        ids = torch.empty((len(self._num_active), tokens, k), dtype=torch.int64)
        gate_weights = torch.empty((len(self._num_active), tokens, k), dtype=torch.float32)
        if tokens:
            self._native.run(
                native.kernels(),
                attention.table(native.isa()),
                plan,
                x.data_ptr(),
                normed.data_ptr(),
                native.native_dtype(x.dtype),
                hidden,
                positions.data_ptr(),
                min((len(cos) for cos, _ in tables), default=sys.maxsize),
                [(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in tables],
                caches.addresses,
                slot_ids.data_ptr(),
                caches.num_slots,
                ids.data_ptr(),
                gate_weights.data_ptr(),
                torch.get_num_threads(),
            )
        return ids, gate_weights

    def _takes_tables(self, tables: Sequence[tuple[Tensor, Tensor]]) -> bool:
        return len(tables) >= len(self._rope_limits) and all(
            table.is_cpu
            and table.dtype is torch.float32
            and table.shape == cos.shape
            and table.dim() == 2
            and 2 * table.shape[1] <= self._rope_limits.get(index, sys.maxsize)
            for index, (cos, sin) in enumerate(tables)
            for table in (cos, sin)
        )

    def _bind(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> _Caches:
        """What `run` has to know of the caches, which are the same step after step."""
        if self._caches is None or self._caches.keys is not keys or self._caches.values is not values:
            self._caches = self._look_at(keys, values)
        return self._caches

    def _look_at(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> _Caches:
        tensors = (*keys, *values)
        dtype, num_slots = (tensors[0].dtype, len(tensors[0])) if tensors else (torch.float32, 0)
        shapes = [(num_slots, a.attention.num_kv_heads, a.attention.head_dim) for a in self._layers]
        fits = (
            [tuple(c.shape) for c in keys] == [tuple(c.shape) for c in values] == shapes
            and dtype in native.FLOAT_TYPES
            and all(c.is_cpu and c.dtype is dtype and c.is_contiguous() for c in tensors)
        )
        addresses = [(k.data_ptr(), v.data_ptr()) for k, v in zip(keys, values, strict=True)] if fits else []
        return _Caches(keys, values, dtype if fits else None, num_slots, addresses)

    def _add(self, layer: DecoderLayer, norm_eps: float) -> None:
        part, mlp = layer.attention, layer.mlp
        norms = (*(part.head_norms or (None, None)), layer.mlp_norm, layer.next_norm)
        self._native.begin_layer(
            [self._projection(projection) for projection in part.projections],
            [self._vector(norm) for norm in norms],
            part.head_norm_eps,
            norm_eps,
            part.num_heads,
            part.num_kv_heads,
            part.head_dim,
            part.scale,
            part.window or 0,
            self._vector(None if part.sinks is None else part.sinks.float())[0],
            -1 if part.rope is None else part.rope,
        )
        if isinstance(mlp, DenseLayer):
            self._native.set_dense(*(self._projection(projection) for projection in (mlp.gate, mlp.up, mlp.down)))
            return
        activation = mlp.activation
        self._native.set_mixture(
            mlp.router.native,
            mlp.num_active,
            mlp.normalises,
            mlp.sum_eps,
            panels.native_experts(mlp.experts),
            activation.alpha,
            activation.offset,
            math.inf if activation.limit is None else activation.limit,
        )

    def _projection(self, projection: Projection) -> tuple[object, int, _native.DType]:
        weight, bias = projection
        return weight.native, *self._vector(bias)

    def _vector(self, vector: Tensor | None) -> tuple[int, _native.DType]:
        if vector is None:
            return 0, native.native_dtype(torch.float32)
        self._kept.append(vector.contiguous())
        return self._kept[-1].data_ptr(), native.native_dtype(vector.dtype)


def _is_index(ids: Tensor, size: int) -> bool:
    return ids.is_cpu and ids.shape == (size,) and ids.dtype is torch.int64 and ids.is_contiguous()


def fits(layers: Sequence[DecoderLayer]) -> bool:
    """Whether the extension, which is given addresses, can run these layers: weights in panels, shapes that agree."""
    if not native.is_available() or not layers:
        return False
    hidden = layers[0].mlp_norm.shape[0]
    mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, MixtureLayer)]
    return len({mixture.num_active for mixture in mixtures}) <= 1 and all(
        _fits_attention(layer.attention, hidden)
        and _fits_mlp(layer.mlp, hidden)
        and _is_vector(layer.mlp_norm, hidden)
        and _is_vector(layer.next_norm, hidden)
        for layer in layers
    )


def _fits_attention(part: AttentionLayer, hidden: int) -> bool:
    query_size, key_size = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
    shapes = (query_size, hidden), (key_size, hidden), (key_size, hidden), (hidden, query_size)
    norms: Sequence[Tensor] = part.head_norms or ()
    return (
        part.num_kv_heads > 0
        and part.num_heads % part.num_kv_heads == 0
        and (part.window is None or part.window > 0)
        and all(_is_projection(*pair) for pair in zip(part.projections, shapes, strict=True))
        and all(_is_vector(norm, part.head_dim) and norm.dtype is norms[0].dtype for norm in norms)
        and (part.sinks is None or _is_vector(part.sinks, part.num_heads))
    )


def _fits_mlp(mlp: DenseLayer | MixtureLayer, hidden: int) -> bool:
    if isinstance(mlp, DenseLayer):
        width = mlp.gate[0].shape[0]
        inner = (mlp.gate, (width, hidden)), (mlp.up, (width, hidden)), (mlp.down, (hidden, width))
        return all(_is_projection(projection, shape) for projection, shape in inner)
    return (
        1 <= mlp.num_active <= len(mlp.experts)
        and mlp.router.native is not None
        and mlp.router.shape == (len(mlp.experts), hidden)
        and mlp.experts[0].gate.shape[1] == hidden
        and panels.supports_moe(torch.empty(0), mlp.experts)
    )


def _is_projection(projection: Projection, shape: tuple[int, int]) -> bool:
    weight, bias = projection
    return weight.native is not None and weight.shape == shape and (bias is None or _is_vector(bias, shape[0]))


def _is_vector(vector: Tensor, size: int) -> bool:
    return vector.is_cpu and vector.shape == (size,) and vector.dtype in native.FLOAT_TYPES
