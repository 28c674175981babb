"""One function per operator: the Triton kernel where it takes the arguments, else the reference.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.
Semantics, shapes and types of every operator are those of `amalgam.kernels.backends.reference.operators`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amalgam.kernels.backends.base import OwnMixture
from amalgam.kernels.backends.reference.operators import Operators
from amalgam.kernels.backends.triton import experts as mixtures
from amalgam.kernels.backends.triton import products, steps
from amalgam.kernels.backends.triton.kinds import TritonWeight
from amalgam.kernels.backends.triton.launching import FLOAT_TYPES
from amalgam.kernels.backends.triton.steps import StepOperators
from amalgam.kernels.program import Embed, Head, Instruction, Mix, Program, Project, Route
from amalgam.kernels.weights import SWIGLU, ExpertTable, GatedActivation, PackedWeight


class TritonOperators(StepOperators):
    """See `Operators`."""

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
            return products.linears(x, (weight,), (bias,), out_dtype)[0]
        return Operators.linear(x, weight, bias, out_dtype)

    @classmethod
    def linears(
        cls, x: Tensor, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        if all(products.supports_linear(x, weight) for weight in weights):
            return products.linears(x, weights, (None,) * len(weights) if biases is None else biases)
        return super().linears(x, weights, biases)

    @staticmethod
    def moe(
        x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: GatedActivation = SWIGLU
    ) -> Tensor:
        if mixtures.supports_moe(x, experts):
            return mixtures.moe(x, expert_ids, gate_weights, experts, activation)
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
        if mixtures.supports_moe(x, experts) and out.is_contiguous() and out.dtype in (x.dtype, torch.float32):
            mixtures.expert_outputs(x, expert_ids, experts, activation, out)
        else:
            Operators.expert_outputs(x, expert_ids, experts, activation, out, num_threads=num_threads)

    @staticmethod
    def weighted_sum(outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
        if mixtures.supports_sum(outputs, gate_weights, dtype):
            return mixtures.weighted_sum(outputs.contiguous(), expert_ids, gate_weights, dtype)
        return Operators.weighted_sum(outputs, expert_ids, gate_weights, dtype)


def has_kernel(instruction: Instruction, dtype: torch.dtype) -> bool:
    """Whether kernels do an instruction's work, with activations of a type."""
    match instruction:
        case Project(projections=projections):
            weights = [projection.weight for projection in projections]
        case Embed(weight=weight) | Head(weight=weight):
            weights = [weight]
        case Mix(experts=experts):
            return isinstance(experts, mixtures.TritonExperts) and dtype in FLOAT_TYPES
        case Route(weight=weight) if steps.has_kernel(instruction, dtype):
            weights = [weight]
        case _:
            return steps.has_kernel(instruction, dtype)
    return all(isinstance(weight, TritonWeight) for weight in weights) and dtype in FLOAT_TYPES


def who_runs(instruction: Instruction, dtype: torch.dtype, device: torch.device) -> str:
    """Who does an instruction's work where these operators run it, with activations of a type; for people."""
    return f"{'triton' if has_kernel(instruction, dtype) else 'torch'} ({device})"


def why_not_recorded(program: Program, dtype: torch.dtype) -> str | None:
    """Why steps of this program cannot be recorded; None if they can. What torch multiplies may ask the host."""
    for one in program.instructions:
        if isinstance(one, Mix) and isinstance(one.experts, OwnMixture):
            return "experts lie on several devices"
        if isinstance(one, Embed | Head | Mix | Project | Route) and not has_kernel(one, dtype):
            return f"{type(one).__name__} reads weights that no kernel reads"
    return steps.why_not_recorded(program, dtype)
