"""A standard model's step in one call of the extension, from token ids to logits.

In: the weights of standard layers, all in panels, and what stands before and after them. Out: a `Stack` that runs them
and gives, bit for bit, what the operators of `amalgam.kernels.ops` give one by one. Must never know: names, plans,
requests.

Between two products a layer's many small calls would fetch Python's code and data back into caches that the weights
have just filled: with one sequence that was a fifth of a step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from amalgam.kernels import attention, native, panels
from amalgam.kernels.packed import Activation, ExpertTable, PackedWeight

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


class StepSequence(NamedTuple):
    """One sequence's share of a step.

    Attributes:
        token_ids: one after another, the first of them at `first_position`.
        block_ids: the cache's blocks with its keys and values, from position 0 on.
        num_logits: of how many of the last tokens the logits are wanted.
    """

    token_ids: list[int]
    first_position: int
    block_ids: Sequence[int]
    num_logits: int


Tables = Sequence[tuple[Tensor, Tensor]]


@dataclass(eq=False)
class _Memory:
    """What steps find in the same place, and the extension's view of it; `native` is None where it does not fit."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    block_size: int
    tables: Tables
    dtype: torch.dtype
    native: _native.StackMemory | None
    kept: list[Tensor]
    results: Tensor = field(default_factory=lambda: torch.empty(0))
    num_rows: int = -1  # of the results: to ask a tensor takes 30 µs where nothing is in the caches

    def results_for(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """`[rows, width]`: those of the step before if it had as many, as making a tensor takes 50 µs."""
        if self.num_rows != rows:
            self.results, self.num_rows = torch.empty((rows, width), dtype=dtype), rows
        return self.results


class Stack:
    """A model that is run in one call. Keeps alive what it needs of it.

    Attributes:
        has_embedding: it looks token ids up; otherwise `run` is given what they stand for.
        has_head: it gives logits; otherwise hidden states.
    """

    def __init__(
        self,
        layers: Sequence[DecoderLayer],
        norm_eps: float,
        first_norm: Tensor,
        embedding: PackedWeight | None = None,
        head: Projection | None = None,
    ) -> None:
        """
        Args:
            first_norm: before the first layer.
            embedding, head: used where the extension can read them.

        Raises:
            ValueError: `fits` does not hold.
        """
        from amalgam import _native

        hidden = len(first_norm)
        if not fits(layers) or not _is_vector(first_norm, len(layers[0].mlp_norm)):
            raise ValueError("a stack needs its weights in panels, and float32 or bfloat16 beside them")
        self.has_embedding = embedding is not None and _is_embedding(embedding, hidden)
        self.has_head = head is not None and _is_projection(head, (head[0].shape[0], hidden))
        self._layers = layers
        self._hidden = hidden
        self._width = head[0].shape[0] if head is not None and self.has_head else hidden  # of a result
        self._kept: list[Tensor] = []
        self._native = _native.Stack(
            hidden,
            *self._embedding(embedding if self.has_embedding else None),
            self._vector(first_norm),
            norm_eps,
            self._projection(head) if head is not None and self.has_head else None,
        )
        self._kernels, self._attention = native.kernels(), attention.table(native.isa())
        self._memory: _Memory | None = None
        # By rope, the narrowest head that it turns.
        self._rope_limits: dict[int, int] = {}
        for part in (layer.attention for layer in layers):
            if part.rope is not None:
                self._rope_limits[part.rope] = min(part.head_dim, self._rope_limits.get(part.rope, part.head_dim))
        self._num_active = [layer.mlp.num_active for layer in layers if isinstance(layer.mlp, MixtureLayer)]
        for layer in layers:
            self._add(layer, norm_eps)

    def takes(
        self, dtype: torch.dtype, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], block_size: int, tables: Tables
    ) -> bool:
        """Whether `run` takes activations of this type, these caches and these tables."""
        memory = self._bind(keys, values, block_size, tables)
        return memory.native is not None and memory.dtype is dtype

    def run(
        self,
        sequences: Sequence[StepSequence],
        *,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        block_size: int,
        tables: Tables,
        x: Tensor | None = None,
        wants_routing: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The whole step, in the type of the caches.

        Args:
            keys, values: each layer's cache, `[slots, kv_heads, head_dim]`, of one type.
            tables: cos and sin of all positions, float32 `[positions, r / 2]`, one pair for each rope.
            x: the embedded tokens, `[tokens, hidden]`; needed where the stack has no embedding.

        Returns float32 logits `[rows, vocabulary]` of the rows that the sequences want, or without a head `[rows,
        hidden]` after the last norm, which the next step may overwrite; and, if wanted, ids int64 and gate weights
        float32 of the experts, `[mixtures, tokens, k]`, which stay. The objects `keys`, `values` and `tables` should
        be the same in every step: they are looked at when they are others than before.

        Raises:
            ValueError: shapes or types that do not fit together.
            IndexError: a token or a slot that there is not, or a position that is not in the tables.
        """
        memory = self._bind(keys, values, block_size, tables)
        tokens = rows = 0
        for token_ids, _, _, num_logits in sequences:
            tokens += len(token_ids)
            rows += min(num_logits, len(token_ids))
        if (
            memory.native is None
            or (x is None and not self.has_embedding)
            or (x is not None and not self._takes_embedded(x, tokens, memory.dtype))
        ):
            what = "token ids" if x is None else f"{x.dtype} {tuple(x.shape)}"
            raise ValueError(f"a stack of {len(self._layers)} layers cannot run {what} over these caches and tables")
        out = memory.results_for(rows, self._width, torch.float32 if self.has_head else memory.dtype)
        ids = gate_weights = None
        if wants_routing:
            shape = len(self._num_active), tokens, self._num_active[0] if self._num_active else 0
            ids, gate_weights = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float32)
        if tokens:
            self._native.run(
                self._kernels,
                self._attention,
                memory.native,
                sequences,
                native.native_dtype(memory.dtype),
                0 if x is None else x.data_ptr(),
                0 if ids is None else ids.data_ptr(),
                0 if gate_weights is None else gate_weights.data_ptr(),
                out.data_ptr(),
                rows,
                torch.get_num_threads(),
            )
        return out, ids, gate_weights

    def _takes_embedded(self, x: Tensor, tokens: int, dtype: torch.dtype) -> bool:
        return x.is_cpu and x.dtype is dtype and x.shape == (tokens, self._hidden) and x.is_contiguous()

    def _bind(self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], block_size: int, tables: Tables) -> _Memory:
        known = self._memory
        if (
            known is None
            or known.keys is not keys
            or known.values is not values
            or known.tables is not tables
            or known.block_size != block_size
        ):
            known = self._memory = self._look_at(keys, values, block_size, tables)
        return known

    def _look_at(
        self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], block_size: int, tables: Tables
    ) -> _Memory:
        from amalgam import _native

        tensors = (*keys, *values)
        dtype, num_slots = (tensors[0].dtype, len(tensors[0])) if tensors else (torch.float32, 0)
        shapes = [(num_slots, a.attention.num_kv_heads, a.attention.head_dim) for a in self._layers]
        if (
            not [tuple(c.shape) for c in keys] == [tuple(c.shape) for c in values] == shapes
            or dtype not in native.FLOAT_TYPES
            or not all(c.is_cpu and c.dtype is dtype and c.is_contiguous() for c in tensors)
            or not self._takes_tables(tables)
        ):
            return _Memory(keys, values, block_size, tables, dtype, None, [])
        dense = [(cos.contiguous(), sin.contiguous()) for cos, sin in tables]
        memory = _native.StackMemory(
            [(k.data_ptr(), v.data_ptr()) for k, v in zip(keys, values, strict=True)],
            num_slots,
            block_size,
            [(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in dense],
            min((len(cos) for cos, _ in tables), default=sys.maxsize),
        )
        return _Memory(keys, values, block_size, tables, dtype, memory, [table for pair in dense for table in pair])

    def _takes_tables(self, tables: Tables) -> bool:
        return len(tables) >= len(self._rope_limits) and all(
            table.is_cpu
            and table.dtype is torch.float32
            and table.shape == cos.shape
            and table.dim() == 2
            and 2 * table.shape[1] <= self._rope_limits.get(index, sys.maxsize)
            for index, (cos, sin) in enumerate(tables)
            for table in (cos, sin)
        )

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

    def _embedding(self, weight: PackedWeight | None) -> tuple[object, int, _native.DType, int]:
        if weight is None or weight.native is not None:
            return None if weight is None else weight.native, *self._vector(None), 0
        return None, *self._vector(weight.dense), weight.shape[0]

    def _projection(self, projection: Projection) -> tuple[object, int, _native.DType]:
        weight, bias = projection
        return weight.native, *self._vector(bias)

    def _vector(self, vector: Tensor | None) -> tuple[int, _native.DType]:
        if vector is None:
            return 0, native.native_dtype(torch.float32)
        self._kept.append(vector.contiguous())
        return self._kept[-1].data_ptr(), native.native_dtype(vector.dtype)


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


def _is_embedding(weight: PackedWeight, hidden: int) -> bool:
    if weight.shape[1:] != (hidden,):
        return False
    return weight.native is not None or (
        weight.layout == "dense" and weight.dense.is_cpu and weight.dense.dtype in native.NAMES
    )


def _is_projection(projection: Projection, shape: tuple[int, int]) -> bool:
    weight, bias = projection
    return weight.native is not None and weight.shape == shape and (bias is None or _is_vector(bias, shape[0]))


def _is_vector(vector: Tensor, size: int) -> bool:
    return vector.is_cpu and vector.shape == (size,) and vector.dtype in native.FLOAT_TYPES
