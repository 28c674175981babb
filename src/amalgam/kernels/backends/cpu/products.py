"""Products with weights in panels: linear, embedding, routing, the fused mixture of experts.

In: packed weights in panels, activations. Out: activations. Must never know: names, plans, requests.

Arithmetic depends on the type of the activations:

- bfloat16 with integers of 1 to 8 bits, or with tables of them: activations are quantized to int8 per token and group
  of up to 128 inputs (the largest divisor of the weight's group, in steps of what is packed together), products are
  exact integers, scales and offsets are applied in float32; `activation="bf16"` instead multiplies bfloat16 by the
  integers, or by values rounded to bfloat16 where groups have offsets or parts;
- the same by values rounded to bfloat16 where what is packed together is no divisor of the groups;
- bfloat16 with fp8, bf16 or a table of floats: products of bfloat16, sums and scales in float32; coded bf16 adds the
  few values that its code has no place for at the end (an infinite activation gives NaN where it meets one of them);
- otherwise, and always for float32 activations: the weight's values in float32, summed in one order that is the same
  for all layouts, so that a quantized weight and its expanded copy give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.cpu.elementwise import numbers_of
from amalgam.kernels.backends.cpu.panels import PanelWeight
from amalgam.kernels.weights import SWIGLU, Expert, ExpertTable, GatedActivation, PackedWeight

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
    extension.kernels().embedding(matrix_of(weight), row_ids, out, torch.get_num_threads())
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
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if x.dtype not in extension.FLOAT_TYPES or out_dtype not in extension.FLOAT_TYPES:
        return [out.to(out_dtype) for out in linears(x.float(), weights, biases)]
    results = [torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype) for weight in weights]
    outputs = [
        (matrix_of(weight), None if bias is None else bias.contiguous(), out)
        for weight, bias, out in zip(weights, biases, results, strict=True)
    ]
    extension.kernels().linear(x.contiguous(), outputs, torch.get_num_threads())
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
    ids = torch.empty((x.shape[0], k), dtype=torch.int64)
    gate_weights = torch.empty((x.shape[0], k), dtype=torch.float32)
    extension.kernels().route(
        matrix_of(weight), x.contiguous(), normalises, sum_eps, ids, gate_weights, torch.get_num_threads()
    )
    return ids, gate_weights


@dataclass(frozen=True, eq=False)
class PanelExperts(ExpertTable):
    """Experts whose projections are all in panels.

    Attributes:
        native: the table as the extension reads it; keeps alive what it points to.
    """

    native: _native.Experts = field(kw_only=True)


def prepare_experts(experts: ExpertTable) -> ExpertTable:
    """The experts ready for `moe`; themselves where some are not in panels, lie elsewhere or are of another shape."""
    from amalgam import _native

    if (
        not len(experts)
        or any(experts.devices)
        or not all(_is_packed(expert, experts[0]) for expert in experts.experts)
    ):
        return experts
    table = _native.Experts()
    for expert in experts.experts:
        biases = (
            None if bias is None else bias.float().contiguous()
            for bias in (expert.gate_bias, expert.up_bias, expert.down_bias)
        )
        table.add(matrix_of(expert.gate), matrix_of(expert.up), matrix_of(expert.down), *biases)
    return PanelExperts(experts.experts, native=table)


def supports_moe(x: Tensor, experts: ExpertTable) -> bool:
    """Whether `moe` takes these."""
    return (
        isinstance(experts, PanelExperts)
        and x.device.type == "cpu"
        and (x.dtype in extension.FLOAT_TYPES or x.dtype == torch.float16)
    )


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: GatedActivation = SWIGLU
) -> Tensor:
    """The mixture of experts in one call; see `operators.moe`. Between the operators everything stays float32.

    Raises:
        IndexError: an expert id without an expert, other than -1.
        ValueError: shapes that do not fit together.
    """
    assert isinstance(experts, PanelExperts), type(experts)
    if x.dtype is torch.float16:
        return moe(x.float(), expert_ids, gate_weights, experts, activation).to(x.dtype)
    x = x.contiguous()
    out = torch.empty_like(x)
    extension.kernels().moe(
        experts.native,
        x,
        expert_ids.long().contiguous(),
        gate_weights.float().contiguous(),
        out,
        *numbers_of(activation),
        torch.get_num_threads(),
    )
    return out


def expert_outputs(
    x: Tensor,
    expert_ids: Tensor,
    experts: ExpertTable,
    activation: GatedActivation,
    out: Tensor,
    *,
    num_threads: int | None = None,
) -> None:
    """The first half of `moe`, all in float32; see `operators.expert_outputs`.

    Raises:
        IndexError: an expert id without an expert, other than -1.
        ValueError: shapes that do not fit together.
    """
    assert isinstance(experts, PanelExperts), type(experts)
    extension.kernels().expert_outputs(
        experts.native,
        x.contiguous() if x.dtype in extension.FLOAT_TYPES else x.float().contiguous(),
        expert_ids,
        out,
        *numbers_of(activation),
        torch.get_num_threads() if num_threads is None else num_threads,
    )


def weighted_sum(outputs: Tensor, expert_ids: Tensor, gate_weights: Tensor, dtype: torch.dtype) -> Tensor:
    """The second half; see `operators.weighted_sum`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    out_type = dtype if dtype in extension.FLOAT_TYPES else torch.float32
    out = torch.empty((outputs.shape[0], outputs.shape[2]), dtype=out_type)
    ids, weights = expert_ids.long().contiguous(), gate_weights.float().contiguous()
    extension.kernels().weighted_sum(outputs, ids, weights, out, torch.get_num_threads())
    return out.to(dtype)


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
