"""Grouped-query attention, and what several families change about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.kernels.program import Attend, Emitter, Normalize, Rows, ScaleByPosition, ScaleBySigmoid, Split
from amalgam.kernels.weights import PackedWeight
from amalgam.models.blocks.norms import norm_weight
from amalgam.models.rope import Rope
from amalgam.models.spec import Slot
from amalgam.models.weights import BlockWeights


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions.

    A family whose projections differ overrides `slots` and `project`. A slot `sinks` (one logit per head that takes
    part in the softmax without a value) is used if there is one.

    Attributes:
        rope: None: the model has positions in its embedding.
        norm_eps: of the head norms.
        has_qkv_bias, has_output_bias: whether the projections have biases.
        has_head_norm: RMSNorm over each query and key head before the rotation (Qwen3).
        window: a token sees this many positions, itself included; None: all before it.
        scale: of the scores; None: 1 / √head_dim.
        softcap: scores are kept within ±softcap by a tanh (Gemma 2).
        is_interleaved: rotary pairs are neighbours, not halves apart.
        head_norm_adds_one: the head norms are Gemma's, see `RmsNorm`.
        head_norm_rounds_last: of the head norms; those that add one do.
        sharpening: (beta, length), perhaps an offset: queries grow with their positions, as `ScaleByPosition` does it.
        norms_last: the head norms come behind the rotation (Hunyuan).
        has_unit_norm: every query and key head is normed, without weights (Llama 4).
        chunk: a token sees no position before the last multiple of it (Llama 4).
        source: the layer whose keys and values it attends to; None: its own. Where they are in a step is said by the
            `project` of the family that has such layers (Gemma 4).
        has_gate: the projection of queries gives each head a gate behind its query; what the head gives is multiplied
            by its sigmoid (Qwen3-Next).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope | None
    norm_eps: float = 1e-6
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_head_norm: bool = False
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None
    is_interleaved: bool = False
    head_norm_adds_one: bool = False
    head_norm_rounds_last: bool = False
    sharpening: tuple[float, int] | tuple[float, int, int] | None = None
    norms_last: bool = False
    has_unit_norm: bool = False
    chunk: int | None = None
    source: int | None = None
    has_gate: bool = False

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        return (self.num_kv_heads, self.head_dim, self.head_dim) if self.source is None else (0, 0, 0)

    @property
    def state_shape(self) -> None:
        return None

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        widths = {"q": self.num_heads * self.head_dim, "k": self.num_kv_heads * self.head_dim}
        widths["v"] = widths["k"]
        for name, width in widths.items():
            rows = 2 * width if name == "q" and self.has_gate else width
            yield Slot(name, (rows, hidden_size), "attention")
            if self.has_qkv_bias:
                yield Slot(f"{name}_bias", (rows,), "bias")
        yield Slot("o", (hidden_size, widths["q"]), "attention")
        if self.has_output_bias:
            yield Slot("o_bias", (hidden_size,), "bias")
        if self.has_head_norm:
            yield Slot("q_norm", (self.head_dim,), "norm")
            yield Slot("k_norm", (self.head_dim,), "norm")

    def emit(self, step: Emitter, x: Rows, weights: BlockWeights) -> Rows:
        query, key, value = self.project(step, x, weights)
        attended = step.rows("attended", self.num_heads * self.head_dim)
        norms = self.head_norms(weights)
        if self.sharpening is not None:
            assert not norms, "a norm behind it would undo the factor"
            step.add(ScaleByPosition(query, *self.sharpening))
        step.add(
            Attend(
                query,
                key,
                value,
                attended,
                layer_id=step.layer_id if self.source is None else self.source,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                scale=self.head_dim**-0.5 if self.scale is None else self.scale,
                head_norms=(norms[0], norms[1]) if norms else None,
                head_norm_eps=self.norm_eps,
                rope=step.rope(self.rope),
                window=self.window,
                sinks=weights.vector("sinks"),
                softcap=self.softcap,
                rounds_last=self.head_norm_rounds_last or self.head_norm_adds_one,
                is_interleaved=self.is_interleaved,
                norms_last=self.norms_last,
                chunk=self.chunk,
            )
        )
        if self.has_gate:
            step.add(ScaleBySigmoid(attended, step.rows("attention_gate", attended.width)))
        (delta,) = step.project(attended, (weights["o"], weights.vector("o_bias"), "delta"))
        return delta

    def head_norms(self, weights: BlockWeights) -> list[Tensor]:
        """Of queries and of keys, as they multiply; none of them where there are no norms."""
        if self.has_unit_norm:
            return [ones_beside(weights["q"], self.head_dim)] * 2
        names = ("q_norm", "k_norm") if self.has_head_norm else ()
        return [norm_weight(weights, name, self.head_norm_adds_one) for name in names]

    def project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows]:
        """Where the queries, `num_heads × head_dim` columns, and the keys and values of the kv heads will be."""
        names = ("q", "gated_query" if self.has_gate else "query"), ("k", "key"), ("v", "value")
        query, key, value = step.project(
            x, *((weights[name], weights.vector(f"{name}_bias"), buffer) for name, buffer in names)
        )
        if self.has_gate:
            width, together = self.num_heads * self.head_dim, query
            query = step.rows("query", width)
            step.add(Split(together, self.num_heads, (query, step.rows("attention_gate", width))))
        return query, key, value


def ones_beside(weight: PackedWeight, size: int) -> Tensor:
    """The weight of a norm that has none, `[size]`, where another weight is."""
    return torch.ones(size, device=next((part.device for part in weight.parts.values()), None))


@dataclass(frozen=True)
class FusedAttention(Attention):
    """One projection gives query, key and value, side by side."""

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        width = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        yield Slot("qkv", (width, hidden_size), "attention")
        if self.has_qkv_bias:
            yield Slot("qkv_bias", (width,), "bias")
        yield Slot("o", (hidden_size, self.num_heads * self.head_dim), "attention")
        if self.has_output_bias:
            yield Slot("o_bias", (hidden_size,), "bias")

    def project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows]:
        (together,) = step.project(x, (weights["qkv"], weights.vector("qkv_bias"), "query_key_value"))
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return (
            together.columns(0, queries),
            together.columns(queries, keys),
            together.columns(queries + keys, keys),
        )


@dataclass(frozen=True)
class WholeNormAttention(Attention):
    """RMSNorm over the whole query and key projections instead of over each head (OLMo).

    `rounds_last`: of these norms, see `RmsNorm`.
    """

    rounds_last: bool = False

    def slots(self, hidden_size: int) -> Iterator[Slot]:
        yield from super().slots(hidden_size)
        yield Slot("q_norm", (self.num_heads * self.head_dim,), "norm")
        yield Slot("k_norm", (self.num_kv_heads * self.head_dim,), "norm")

    def project(self, step: Emitter, x: Rows, weights: BlockWeights) -> tuple[Rows, Rows, Rows]:
        query, key, value = super().project(step, x, weights)
        for rows, name in ((query, "q_norm"), (key, "k_norm")):
            step.add(Normalize(rows, weights[name].dense, rows, self.norm_eps, rounds_last=self.rounds_last))
        return query, key, value
