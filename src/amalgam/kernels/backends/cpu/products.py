"""Products with weights in panels: linear, embedding, routing, the fused mixture of experts.

In: packed weights in panels, activations. Out: activations. Must never know: names, plans, requests.

Arithmetic depends on the type of the activations:

- bfloat16 with int4 or int8: activations are quantized to int8 per token and group of up to 128 inputs (the largest
  divisor of the weight's group, in steps of 8), products are exact integers, scales are applied in float32;
  `activation="bf16"` instead multiplies bfloat16 by the integers;
- bfloat16 with fp8 or bf16: products of bfloat16, sums and scales in float32; coded bf16 adds the few values that its
  code has no place for at the end (an infinite activation gives NaN where it meets one of them);
- otherwise, and always for float32 activations: the weight's values in float32, summed in one order that is the same
  for all layouts, so that a quantized weight and its expanded copy give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.packed import SWIGLU, Activation, Expert, ExpertTable, PackedWeight

if TYPE_CHECKING:
    from amalgam import _native


def matrix_of(weight: PackedWeight) -> _native.Matrix:
    """What the extension knows a weight in panels by."""
    assert isinstance(weight, PanelWeight), weight.layout.name
    return weight.matrix


def supports_embedding(row_ids: Tensor, weight: PackedWeight) -> bool:
    """Whether `embedding` takes these."""
    return isinstance(weight, PanelWeight) and row_ids.device.type == "cpu" and row_ids.dtype == torch.int64


def embedding(row_ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of a weight in panels; see `operators.embedding`.

    Raises:
        IndexError: an id without a row.
    """
    out_type = dtype if dtype in extension.FLOAT_TYPES else torch.float32
    row_ids = row_ids.contiguous()
    out = torch.empty((*row_ids.shape, weight.shape[1]), dtype=out_type)
    extension.kernels().embedding(
        weight=matrix_of(weight),
        row_ids=row_ids.data_ptr(),
        num_ids=row_ids.numel(),
        out=out.data_ptr(),
        out_dtype=extension.native_dtype(out_type),
        threads=torch.get_num_threads(),
    )
    return out.to(dtype)


def supports_linear(x: Tensor, weight: PackedWeight) -> bool:
    """Whether `linear` takes these; float16 activations are computed in float32."""
    return (
        isinstance(weight, PanelWeight)
        and x.device.type == "cpu"
        and (x.dtype in extension.FLOAT_TYPES or x.dtype == torch.float16)
    )


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`x Wᵀ + b`, `[rows, in]` → `[rows, out]`; the arithmetic is that of the module docstring.

    Args:
        out_dtype: of the result, whose sums are rounded to it alone; x's type if None.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    return linears(x, (weight,), (bias,), out_dtype)[0]


def linears(
    x: Tensor,
    weights: Sequence[PackedWeight],
    biases: Sequence[Tensor | None],
    out_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """`linear` of the same rows with several weights, in one call.

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    for weight, bias in zip(weights, biases, strict=True):
        rows, columns = weight.shape
        if x.dim() != 2 or x.shape[1] != columns or (bias is not None and bias.shape != (rows,)):
            shape = None if bias is None else tuple(bias.shape)
            raise ValueError(f"linear of {tuple(x.shape)} with a weight of {weight.shape} and a bias of {shape}")
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.dtype not in extension.FLOAT_TYPES or out_dtype not in extension.FLOAT_TYPES:
        return [out.to(out_dtype) for out in linears(x.float(), weights, biases)]
    x = x.contiguous()
    results = [torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype) for weight in weights]
    if x.shape[0]:
        kept = [None if bias is None else bias.contiguous() for bias in biases]
        outputs = [
            (
                matrix_of(weight),
                0 if bias is None else bias.data_ptr(),
                extension.native_dtype(torch.float32 if bias is None else bias.dtype),
                out.data_ptr(),
            )
            for weight, bias, out in zip(weights, kept, results, strict=True)
        ]
        extension.kernels().linear(
            x.data_ptr(),
            x.shape[0],
            extension.native_dtype(x.dtype),
            outputs,
            extension.native_dtype(out_dtype),
            torch.get_num_threads(),
        )
    return results


def supports_route(x: Tensor, weight: PackedWeight) -> bool:
    """Whether `route` takes these."""
    return (
        isinstance(weight, PanelWeight) and x.device.type == "cpu" and x.dtype in extension.FLOAT_TYPES and x.dim() == 2
    )


def route(x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float) -> tuple[Tensor, Tensor]:
    """See `operators.route`; of equal probabilities the smaller id comes first.

    Raises:
        ValueError: shapes that do not fit together.
    """
    num_experts, hidden = weight.shape
    if not supports_route(x, weight) or x.shape[1] != hidden or not 0 < k <= num_experts:
        raise ValueError(f"routing of {x.dtype} {tuple(x.shape)} by {weight.shape} to {k}")
    x = x.contiguous()
    tokens = x.shape[0]
    ids = torch.empty((tokens, k), dtype=torch.int64)
    gate_weights = torch.empty((tokens, k), dtype=torch.float32)
    if tokens:
        extension.kernels().route(
            matrix_of(weight),
            x.data_ptr(),
            tokens,
            extension.native_dtype(x.dtype),
            k,
            normalises,
            sum_eps,
            ids.data_ptr(),
            gate_weights.data_ptr(),
            torch.get_num_threads(),
        )
    return ids, gate_weights


@dataclass(frozen=True, eq=False)
class PanelExperts(ExpertTable):
    """Experts whose projections are all in panels.

    Attributes:
        native: the table as the extension reads it.
        biases: what it points to, in float32.
    """

    native: _native.Experts = field(kw_only=True)
    biases: Sequence[Tensor] = field(kw_only=True)


def prepare_experts(experts: ExpertTable) -> ExpertTable:
    """The experts ready for `moe`; themselves where a projection is not in panels, or shapes differ."""
    from amalgam import _native

    if not len(experts) or not all(_is_packed(expert, experts[0]) for expert in experts.experts):
        return experts
    table, kept = _native.Experts(), []
    for expert in experts.experts:
        addresses = []
        for bias in (expert.gate_bias, expert.up_bias, expert.down_bias):
            if bias is not None:
                kept.append(bias.float().contiguous())
            addresses.append(0 if bias is None else kept[-1].data_ptr())
        table.add(matrix_of(expert.gate), matrix_of(expert.up), matrix_of(expert.down), *addresses)
    return PanelExperts(experts.experts, native=table, biases=kept)


def supports_moe(x: Tensor, experts: ExpertTable) -> bool:
    """Whether `moe` takes these."""
    return (
        isinstance(experts, PanelExperts)
        and x.device.type == "cpu"
        and (x.dtype in extension.FLOAT_TYPES or x.dtype == torch.float16)
    )


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: Activation = SWIGLU
) -> Tensor:
    """The mixture of experts in one call; see `operators.moe`. Between the operators everything stays float32.

    Raises:
        IndexError: an expert id without an expert.
        ValueError: shapes that do not fit together.
    """
    if not isinstance(experts, PanelExperts) or not supports_moe(x, experts):
        raise ValueError(f"moe of {x.dtype} on {x.device} with experts that are {type(experts).__name__}")
    if x.dim() != 2 or x.shape[1] != experts[0].gate.shape[1]:
        raise ValueError(f"moe of {tuple(x.shape)} with experts of {experts[0].gate.shape}")
    if (
        expert_ids.dim() != 2
        or expert_ids.shape[0] != x.shape[0]
        or expert_ids.shape[1] == 0
        or gate_weights.shape != expert_ids.shape
        or not (expert_ids.is_cpu and gate_weights.is_cpu)
    ):
        raise ValueError(f"moe with ids {tuple(expert_ids.shape)} and gate weights {tuple(gate_weights.shape)}")
    if x.dtype not in extension.FLOAT_TYPES:
        return moe(x.float(), expert_ids, gate_weights, experts, activation).to(x.dtype)
    x, ids, weights = x.contiguous(), expert_ids.long().contiguous(), gate_weights.float().contiguous()
    out = torch.empty_like(x)
    if out.numel():
        extension.kernels().moe(
            experts.native,
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            ids.shape[1],
            activation.alpha,
            activation.offset,
            math.inf if activation.limit is None else activation.limit,
            extension.native_dtype(x.dtype),
            torch.get_num_threads(),
        )
    return out


def _is_packed(expert: Expert, first: Expert) -> bool:
    weights, like = (expert.gate, expert.up, expert.down), (first.gate, first.up, first.down)
    if not all(isinstance(weight, PanelWeight) for weight in weights):
        return False
    width, hidden = first.gate.shape
    biases = ((expert.gate_bias, width), (expert.up_bias, width), (expert.down_bias, hidden))
    return (
        all(weight.shape == other.shape for weight, other in zip(weights, like, strict=True))
        and first.up.shape == (width, hidden)
        and first.down.shape == (hidden, width)
        and all(bias is None or bias.shape == (size,) for bias, size in biases)
    )
