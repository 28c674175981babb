"""One function per operator: the compiled one where it takes the arguments, else the reference.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.
Semantics, shapes and types of every operator are those of `amalgam.kernels.backends.reference.operators`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import attention, elementwise, extension, products
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.program import (
    Attend,
    AttendLatent,
    Choose,
    Embed,
    Head,
    Instruction,
    KeepIndexKey,
    Mix,
    Normalize,
    Project,
    Route,
    SwiGlu,
)
from amalgam.kernels.step import AttentionBatch, AttentionOptions, CachedAttention, LayerCache
from amalgam.kernels.weights import SWIGLU, ExpertTable, GatedActivation, PackedWeight


class CpuOperators(Operators):
    """See `Operators`. Experts are multiplied in compiled code where `products.prepare_experts` has taken them."""

    @staticmethod
    def embedding(token_ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        if products.supports_embedding(token_ids, weight):
            return products.embedding(token_ids, weight, dtype)
        return Operators.embedding(token_ids, weight, dtype)

    @staticmethod
    def linear(
        x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        if products.supports_linear(x, weight):
            return products.linear(x, weight, bias, out_dtype)
        return Operators.linear(x, weight, bias, out_dtype)

    @classmethod
    def linears(
        cls, x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        if all(products.supports_linear(x, weight) for weight in weights):
            return products.linears(x, weights, (None,) * len(weights) if biases is None else biases)
        return super().linears(x, weights, biases)

    @staticmethod
    def route(
        x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        if products.supports_route(x, weight):
            return products.route(x, weight, k, normalises=normalises, sum_eps=sum_eps)
        return Operators.route(x, weight, k, normalises=normalises, sum_eps=sum_eps)

    @staticmethod
    def moe(
        x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: GatedActivation = SWIGLU
    ) -> Tensor:
        if products.supports_moe(x, experts):
            return products.moe(x, expert_ids, gate_weights, experts, activation)
        return Operators.moe(x, expert_ids, gate_weights, experts, activation)

    @staticmethod
    def expert_outputs(
        x: Tensor,
        expert_ids: Tensor,
        experts: ExpertTable,
        activation: GatedActivation,
        out: Tensor,
        *,
        num_threads: int | None = None,
    ) -> None:
        compute = products.expert_outputs if products.supports_moe(x, experts) else Operators.expert_outputs
        compute(x, expert_ids, experts, activation, out, num_threads=num_threads)

    @staticmethod
    def weighted_sum(outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
        add = products.weighted_sum if extension.is_available() and outputs.is_cpu else Operators.weighted_sum
        return add(outputs, expert_ids, gate_weights, dtype)

    @staticmethod
    def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if elementwise.supports_rms_norm(x, weight):
            return elementwise.add_rms_norm(x, delta, weight, eps)
        return Operators.add_rms_norm(x, delta, weight, eps)

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if elementwise.supports_rms_norm(x, weight):
            return elementwise.rms_norm(x, weight, eps)
        return Operators.rms_norm(x, weight, eps)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if elementwise.supports_rotate(x, cos, sin):
            return elementwise.rotate(x, cos, sin)
        return Operators.rotate(x, cos, sin)

    @staticmethod
    def gated(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
        if elementwise.supports_gated(gate, up):
            return elementwise.gated(gate, up, activation)
        return Operators.gated(gate, up, activation)

    @staticmethod
    def write_kv(cache: LayerCache, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
        if attention.supports_write_kv(cache, key, value, slot_ids):
            attention.write_kv(cache, key, value, slot_ids)
        else:
            Operators.write_kv(cache, key, value, slot_ids)

    @staticmethod
    def paged_attention(
        query: Tensor, cache: LayerCache, batch: AttentionBatch, **how: Unpack[AttentionOptions]
    ) -> Tensor:
        is_compiled = attention.supports_paged_attention(query, cache, batch)
        attend = attention.paged_attention if is_compiled else Operators.paged_attention
        return attend(query, cache, batch, **how)

    @staticmethod
    def index_scores(query: Tensor, weights: Tensor, cache: LayerCache, batch: AttentionBatch) -> Tensor:
        is_compiled = attention.supports_paged_attention(query, cache, batch)
        score = attention.index_scores if is_compiled else Operators.index_scores
        return score(query, weights, cache, batch)

    @classmethod
    def cached_attention(cls, query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> Tensor:
        if attention.supports_cached_attention(query, key, value, how):
            return attention.cached_attention(query, key, value, how)
        return super().cached_attention(query, key, value, how)


def who_runs(instruction: Instruction, dtype: torch.dtype) -> str:
    """Who does an instruction's work where these operators run it, with activations of a type; for people."""
    match instruction:
        case Project(projections=projections):
            is_compiled = all(isinstance(projection.weight, PanelWeight) for projection in projections)
        case Embed(weight=weight) | Head(weight=weight):
            is_compiled = isinstance(weight, PanelWeight)
        case Mix(experts=experts):
            is_compiled = isinstance(experts, products.PanelExperts)
        case Attend() | AttendLatent() | KeepIndexKey() | Choose() | Normalize(bias=None) | SwiGlu():
            is_compiled = dtype in extension.FLOAT_TYPES
        case Route(weight=weight):
            is_compiled = isinstance(weight, PanelWeight) and dtype in extension.FLOAT_TYPES
        case _:
            is_compiled = False
    return f"native operators ({extension.isa()})" if is_compiled else "torch (cpu)"
