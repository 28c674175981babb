"""The operators of a step that are no products of weights: a kernel where there is one for the arguments, else torch.

In: activations, the cache, an `AttentionBatch`. Out: activations. Must never know: names, plans, requests.
Semantics, shapes and types of every operator are those of `amalgam.kernels.backends.reference.operators`.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.backends.triton import attention, elementwise, heads, routing
from amalgam.kernels.backends.triton.batches import TokenBatch
from amalgam.kernels.backends.triton.launching import FLOAT_TYPES
from amalgam.kernels.layouts import dense
from amalgam.kernels.program import (
    Attend,
    AttendLatent,
    Call,
    Choose,
    Convolve,
    DeltaRule,
    Gelu,
    Instruction,
    KeepIndexKey,
    Normalize,
    Program,
    Route,
    Rows,
    ScanStates,
    SwiGlu,
)
from amalgam.kernels.step import AttentionBatch, AttentionOptions, CachedAttention, LayerCache
from amalgam.kernels.weights import GatedActivation, PackedWeight


class StepOperators(Operators):
    """See `Operators`. Products of weights are left to the class that is made of this one."""

    @staticmethod
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if elementwise.supports_norm(x, weight):
            return elementwise.rms_norm(x, weight, eps)
        return Operators.rms_norm(x, weight, eps)

    @staticmethod
    def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if elementwise.supports_norm(x, weight) and delta.dtype is x.dtype:
            return elementwise.add_rms_norm(x, delta, weight, eps)
        return Operators.add_rms_norm(x, delta, weight, eps)

    @staticmethod
    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        if elementwise.supports_norm(x, weight) and bias.shape == weight.shape:
            return elementwise.layer_norm(x, weight, bias, eps)
        return Operators.layer_norm(x, weight, bias, eps)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if heads.supports_rotate(x, cos, sin):
            return heads.rotate(x, cos, sin)
        return Operators.rotate(x, cos, sin)

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return elementwise.gelu(x) if elementwise.supports_gelu(x) else Operators.gelu(x)

    @staticmethod
    def gated(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
        if elementwise.supports_gated(gate, up):
            return elementwise.gated(gate, up, activation)
        return Operators.gated(gate, up, activation)

    @classmethod
    def route(
        cls, x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        everything = Rows("x", x.shape[1], 0, x.shape[1])
        how = Route(everything, weight, 0, k, normalises=normalises, sum_eps=sum_eps)
        return cls.choose_experts(cls.linear(x.float(), weight), how)

    @classmethod
    def choose_experts(cls, scores: Tensor, one: Route) -> tuple[Tensor, Tensor]:
        if routing.supports(scores):
            return routing.choose_experts(scores, one)
        return super().choose_experts(scores, one)

    @staticmethod
    def write_kv(cache: LayerCache, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
        if heads.supports(cache, key, slot_ids):
            heads.write(cache, key, value, slot_ids)
        else:
            Operators.write_kv(cache, key, value, slot_ids)

    @staticmethod
    def paged_attention(
        query: Tensor, cache: LayerCache, batch: AttentionBatch, **how: Unpack[AttentionOptions]
    ) -> Tensor:
        is_taken = attention.supports(query, cache, batch)
        if not is_taken and isinstance(batch, TokenBatch):  # which says to torch that there are no sequences
            raise RuntimeError(f"no kernel attends over a cache of {cache.keys.dtype}")
        attend = attention.paged_attention if is_taken else Operators.paged_attention
        return attend(query, cache, batch, **how)

    @classmethod
    def cached_attention(cls, query: Tensor, key: Tensor, value: Tensor, how: CachedAttention) -> Tensor:
        if not (query.dtype is key.dtype is value.dtype and heads.supports(how.cache, query, how.slot_ids)):
            return super().cached_attention(query, key, value, how)
        placed = heads.place(query, key, value, how)
        return cls.paged_attention(placed, how.cache, how.batch, **how.options).flatten(1)


def has_kernel(instruction: Instruction, dtype: torch.dtype) -> bool:
    """Whether kernels of this module do an instruction's work, with activations of a type.

    Of a `Route` it is the choice; its product is one of weights. A latent attention's products for each head are
    torch's.
    """
    if dtype not in FLOAT_TYPES:
        return False
    match instruction:
        case Attend(head_dim=dim, value=value, num_kv_heads=num_heads):
            return attention.takes(dim, value.width // num_heads)
        case AttendLatent(latent_dim=latent, rope_dim=rotated):
            return attention.takes(latent + rotated, latent)
        case Route(weight=weight):
            return routing.takes(weight.shape[0])
        case _:
            return isinstance(instruction, KeepIndexKey | Normalize | SwiGlu | Gelu)


def with_expanded_latents(
    program: Program, dtype: torch.dtype, known: MutableMapping[PackedWeight, PackedWeight]
) -> Program:
    """The same program with the matrices of latent attention expanded: else each step would expand them anew.

    known: those of other versions, so that a weight which versions share is expanded once.
    """

    def expanded(weight: PackedWeight) -> PackedWeight:
        if weight.is_floating:
            return weight
        found = known.get(weight)
        if found is None:
            found = known[weight] = dense(weight.dequantize(dtype))
        return found

    return Program(
        tuple(
            replace(one, expand=expanded(one.expand)) if isinstance(one, AttendLatent) else one
            for one in program.instructions
        )
    )


def why_not_recorded(program: Program, dtype: torch.dtype) -> str | None:
    """Why a step of this program cannot be recorded, as far as it is no product of weights; None if it can.

    Recurrent states and indexers ask the host which sequence comes when, and nobody knows what a `Call` asks.
    """
    if dtype not in FLOAT_TYPES:
        return f"activations in {dtype}"
    for one in program.instructions:
        if isinstance(one, Call | Choose | Convolve | DeltaRule | KeepIndexKey | ScanStates):
            return f"{type(one).__name__} needs the host"
        if isinstance(one, Attend | AttendLatent) and not has_kernel(one, dtype):
            return "heads are wider than the kernels of attention take"
        if isinstance(one, AttendLatent) and not one.expand.is_floating:
            return "the matrices of latent attention are not expanded"
    return None
