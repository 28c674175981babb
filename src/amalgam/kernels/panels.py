"""Linear weights in the compiled kernels' own layout: packing, products, the fused mixture of experts.

In: packed weights in the layouts of `amalgam.kernels.packed`, activations. Out: the same weights in panels, products.
Must never know: names, plans, requests.

Packing loses nothing: values, scales and zero points keep their bits and types, and `unpack` gives what the source
gave. What does not fit stays as it is and runs through the reference:

- scales must belong to one row and a group of inputs whose size is a multiple of 8, to all inputs of a row, or to a
  block whose width is such a multiple;
- with an activation order, every group must hold the same number of inputs;
- fp8 must hold no NaN.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from amalgam.kernels import native
from amalgam.kernels.packed import SWIGLU, Activation, Expert, ExpertTable, PackedWeight

if TYPE_CHECKING:
    from amalgam import _native

ActivationType = Literal["int8", "bf16"]

_DENSE = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_SCALED8 = {torch.float8_e4m3fn: "fp8", torch.int8: "int8"}
_CODED = "bf16_coded"
_DENSE_TYPES = {f"panels_{name}": dtype for dtype, name in _DENSE.items()} | {f"panels_{_CODED}": torch.bfloat16}
_UNIT = 8  # a group is a multiple of this many inputs
_CACHE_KEY = "native"
# The layouts that `prepare` turns into panels where groups and scales allow it.
COMPILED_LAYOUTS = frozenset({"dense", "scaled8", "int4"})


@dataclass(frozen=True)
class Panels:
    """What a weight in panels is, without its bytes.

    Attributes:
        name: the layout without `panels_`.
        block: see `PackedWeight`.
        scale_dtype, num_groups, scale_lanes: of the scales; 0 groups where there are none.
    """

    name: str
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    scale_dtype: torch.dtype
    num_groups: int
    scale_lanes: int
    has_zero: bool

    @classmethod
    def of(cls, weight: PackedWeight) -> Panels:
        """Those of a weight in panels."""
        scale = weight.parts.get("scale")
        dtype, num_groups, lanes = (torch.float32, 0, 1) if scale is None else (scale.dtype, *scale.shape[1:])
        name = weight.layout.removeprefix("panels_")
        return cls(name, weight.shape, weight.block, dtype, num_groups, lanes, "zero" in weight.parts)


def prepare(weight: PackedWeight, activation: ActivationType = "int8", *, codes: bool = True) -> PackedWeight:
    """The weight in panels; itself where that is not possible.

    Args:
        activation: what bfloat16 activations become for integer weights.
        codes: whether bf16 is stored in 12 bits a value, without loss, where its exponents allow it. That takes a
            quarter off what a product reads; products in float32 become slower.
    """
    packed = _pack(weight, activation, codes) if _fits(weight) else None
    if packed is None:
        return weight
    scale = weight.parts.get("scale")
    panels = Panels(
        name=packed.format.name,
        shape=weight.shape,
        block=weight.block,
        scale_dtype=torch.float32 if scale is None else scale.dtype,
        num_groups=0 if scale is None else scale.shape[1],
        scale_lanes=packed.scale_lanes,
        has_zero="zero" in weight.parts,
    )
    return _with_parts(packed, packed.memory, panels, weight.parts.get("group"))


def coded_bytes(shape: tuple[int, ...]) -> int:
    """About what a weight `[out, in]` takes that can be coded, as trained ones can; others keep 16 bits a value."""
    from amalgam import _native

    return min(_native.most_coded_bytes(*shape), 2 * math.prod(shape))


def view(memory: Tensor, panels: Panels, group: Tensor | None, activation: ActivationType) -> PackedWeight:
    """A weight whose panels lie in memory already, as `native_memory` gave them; shares the memory and never writes.

    Args:
        memory: uint8 `[bytes]` from a 64-byte boundary on.
        group: int32 `[in]`, the group of each input; None where they lie in order.
        activation: see `prepare`.

    Raises:
        ValueError: such panels do not exist, or take another number of bytes.
    """
    from amalgam import _native

    if len(panels.shape) != 2 or panels.name not in _native.Format.__members__:
        raise ValueError(f"there are no panels of {panels.name!r} and shape {panels.shape}")
    if panels.scale_dtype not in native.NAMES or (panels.num_groups and panels.block is None):
        raise ValueError(f"panels of {panels.name!r} with scales of {panels.scale_dtype} in blocks of {panels.block}")
    order = None if group is None else _order(group)
    if order is not None and order.shape != panels.shape[1:]:
        raise ValueError(f"{order.numel()} inputs of {panels.shape[1]} have a group")
    packed = _native.view(
        format=_native.Format[panels.name],
        rows=panels.shape[0],
        columns=panels.shape[1],
        memory=memory.data_ptr(),
        nbytes=memory.numel(),
        scale_dtype=native.native_dtype(panels.scale_dtype),
        num_groups=panels.num_groups,
        group=0 if panels.block is None else panels.block[1],
        scale_lanes=panels.scale_lanes,
        has_zero=panels.has_zero,
        order=0 if order is None else order.data_ptr(),
        quantizes=activation == "int8",
        owner=memory,
    )
    return _with_parts(packed, memory, panels, group)


def native_memory(weight: PackedWeight) -> Tensor:
    """The bytes of a weight in panels, uint8 `[bytes]`: all of it but its `group`. Shared, not to be written."""
    return _matrix(weight).memory


def layout_version() -> int:
    """Changes whenever the same panels become other bytes."""
    native.kernels()
    from amalgam import _native

    return _native.layout_version


def _with_parts(packed: _native.Matrix, memory: Tensor, panels: Panels, group: Tensor | None) -> PackedWeight:
    """A matrix of the extension as a packed weight: its parts are slices of its memory."""
    parts = {"weight": memory[: packed.scale_offset]}
    if panels.num_groups:
        grid = (-(-panels.shape[0] // 16), panels.num_groups)
        end = packed.scale_offset + math.prod(grid) * panels.scale_lanes * panels.scale_dtype.itemsize
        scale = memory[packed.scale_offset : end].view(panels.scale_dtype)
        parts["scale"] = scale.view(*grid, panels.scale_lanes)
        if panels.has_zero:
            parts["zero"] = memory[packed.zero_offset :].view(*grid, 16)
    elif packed.scale_offset < memory.numel():
        parts["exceptions"] = memory[packed.scale_offset :]
    if group is not None:
        parts["group"] = group
    return PackedWeight(f"panels_{panels.name}", panels.shape, parts, unpack, panels.block, packed)


def unpack(weight: PackedWeight) -> Tensor:
    """The values of a weight in panels: float32, or its own type where the layout is floating."""
    out = torch.empty(weight.shape, dtype=torch.float32)
    if out.numel():
        native.kernels().unpack(_matrix(weight), out.data_ptr(), torch.get_num_threads())
    return out.to(_DENSE_TYPES.get(weight.layout, torch.float32))


def supports_embedding(row_ids: Tensor, weight: PackedWeight) -> bool:
    """Whether `embedding` takes these."""
    return weight.native is not None and row_ids.device.type == "cpu" and row_ids.dtype == torch.int64


def embedding(row_ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of a weight in panels; see `reference.embedding`.

    Raises:
        IndexError: an id without a row.
    """
    out_type = dtype if dtype in native.FLOAT_TYPES else torch.float32
    row_ids = row_ids.contiguous()
    out = torch.empty((*row_ids.shape, weight.shape[1]), dtype=out_type)
    native.kernels().embedding(
        weight=_matrix(weight),
        row_ids=row_ids.data_ptr(),
        num_ids=row_ids.numel(),
        out=out.data_ptr(),
        out_dtype=native.native_dtype(out_type),
        threads=torch.get_num_threads(),
    )
    return out.to(dtype)


def supports_linear(x: Tensor, weight: PackedWeight) -> bool:
    """Whether `linear` takes these; float16 activations are computed in float32."""
    return (
        weight.native is not None
        and x.device.type == "cpu"
        and (x.dtype in native.FLOAT_TYPES or x.dtype == torch.float16)
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
    if x.dtype not in native.FLOAT_TYPES or out_dtype not in native.FLOAT_TYPES:
        return [out.to(out_dtype) for out in linears(x.float(), weights, biases)]
    x = x.contiguous()
    results = [torch.empty((x.shape[0], weight.shape[0]), dtype=out_dtype) for weight in weights]
    if x.shape[0]:
        kept = [None if bias is None else bias.contiguous() for bias in biases]
        outputs = [
            (
                weight.native,
                0 if bias is None else bias.data_ptr(),
                native.native_dtype(torch.float32 if bias is None else bias.dtype),
                out.data_ptr(),
            )
            for weight, bias, out in zip(weights, kept, results, strict=True)
        ]
        native.kernels().linear(
            x.data_ptr(),
            x.shape[0],
            native.native_dtype(x.dtype),
            outputs,
            native.native_dtype(out_dtype),
            torch.get_num_threads(),
        )
    return results


def supports_route(x: Tensor, weight: PackedWeight) -> bool:
    """Whether `route` takes these."""
    return weight.native is not None and x.device.type == "cpu" and x.dtype in native.FLOAT_TYPES and x.dim() == 2


def route(x: Tensor, weight: PackedWeight, k: int, *, normalises: bool, sum_eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.route`; of equal probabilities the smaller id comes first.

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
        native.kernels().route(
            _matrix(weight),
            x.data_ptr(),
            tokens,
            native.native_dtype(x.dtype),
            k,
            normalises,
            sum_eps,
            ids.data_ptr(),
            gate_weights.data_ptr(),
            torch.get_num_threads(),
        )
    return ids, gate_weights


def supports_moe(x: Tensor, experts: ExpertTable) -> bool:
    """Whether `moe` takes these: every projection of every expert in panels."""
    if x.device.type != "cpu" or not (x.dtype in native.FLOAT_TYPES or x.dtype == torch.float16):
        return False
    if _CACHE_KEY not in experts.cache:
        experts.cache[_CACHE_KEY] = _expert_pointers(experts)
    return experts.cache[_CACHE_KEY] is not None


def moe(
    x: Tensor, expert_ids: Tensor, gate_weights: Tensor, experts: ExpertTable, activation: Activation = SWIGLU
) -> Tensor:
    """The mixture of experts in one call; see `reference.moe`. Between the operators everything stays float32.

    Raises:
        IndexError: an expert id without an expert.
        ValueError: shapes that do not fit together.
    """
    if not supports_moe(x, experts):
        raise ValueError("moe needs every projection in panels")
    pointers = experts.cache[_CACHE_KEY]
    assert isinstance(pointers, _Pointers)
    if x.dim() != 2 or x.shape[1] != experts[0].gate.shape[1]:
        raise ValueError(f"moe of {tuple(x.shape)} with experts of {experts[0].gate.shape}")
    if (
        expert_ids.dim() != 2
        or expert_ids.shape[0] != x.shape[0]
        or expert_ids.shape[1] == 0
        or gate_weights.shape != expert_ids.shape
    ):
        raise ValueError(f"moe with ids {tuple(expert_ids.shape)} and gate weights {tuple(gate_weights.shape)}")
    if x.dtype not in native.FLOAT_TYPES:
        return moe(x.float(), expert_ids, gate_weights, experts, activation).to(x.dtype)
    x, ids, weights = x.contiguous(), expert_ids.long().contiguous(), gate_weights.float().contiguous()
    out = torch.empty_like(x)
    if out.numel():
        native.kernels().moe(
            pointers.table,
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            ids.shape[1],
            activation.alpha,
            activation.offset,
            math.inf if activation.limit is None else activation.limit,
            native.native_dtype(x.dtype),
            torch.get_num_threads(),
        )
    return out


def native_experts(experts: ExpertTable) -> _native.Experts:
    """The table as the extension reads it; the table keeps it alive. Only where `supports_moe`."""
    pointers = experts.cache[_CACHE_KEY]
    assert isinstance(pointers, _Pointers)
    return pointers.table


class _Pointers:
    """An ExpertTable as the extension reads it; keeps alive what it points to."""

    def __init__(self, experts: ExpertTable) -> None:
        from amalgam import _native

        self.table = _native.Experts()
        self._biases: list[Tensor] = []
        for expert in experts.experts:
            biases = [self._bias(bias) for bias in (expert.gate_bias, expert.up_bias, expert.down_bias)]
            self.table.add(_matrix(expert.gate), _matrix(expert.up), _matrix(expert.down), *biases)

    def _bias(self, bias: Tensor | None) -> int:
        if bias is None:
            return 0
        self._biases.append(bias.float().contiguous())
        return self._biases[-1].data_ptr()


def _expert_pointers(experts: ExpertTable) -> _Pointers | None:
    return (
        _Pointers(experts)
        if len(experts) and all(_is_packed(expert, experts[0]) for expert in experts.experts)
        else None
    )


def _is_packed(expert: Expert, first: Expert) -> bool:
    weights, like = (expert.gate, expert.up, expert.down), (first.gate, first.up, first.down)
    if any(weight.native is None for weight in weights):
        return False
    width, hidden = first.gate.shape
    biases = ((expert.gate_bias, width), (expert.up_bias, width), (expert.down_bias, hidden))
    return (
        all(weight.shape == other.shape for weight, other in zip(weights, like, strict=True))
        and first.up.shape == (width, hidden)
        and first.down.shape == (hidden, width)
        and all(bias is None or bias.shape == (size,) for bias, size in biases)
    )


def _matrix(weight: PackedWeight) -> _native.Matrix:
    """What the extension knows a weight in panels by."""
    matrix: _native.Matrix = weight.native  # type: ignore[assignment]
    return matrix


def _format_name(weight: PackedWeight) -> str:
    """What the extension calls a weight's values; empty for layouts that are not its own, whose parts nobody knows."""
    if weight.layout == "int4":
        return "int4"
    names = {"dense": _DENSE, "scaled8": _SCALED8}.get(weight.layout)
    return "" if names is None else names.get(weight.parts["weight"].dtype, "")


def _fits(weight: PackedWeight) -> bool:
    if not native.is_available() or weight.native is not None or len(weight.shape) != 2:
        return False
    if not all(weight.shape) or not _format_name(weight):
        return False
    if any(part.device.type != "cpu" for part in weight.parts.values()):
        return False
    scale, group = weight.parts.get("scale"), weight.parts.get("group")
    if scale is None:
        return True
    assert weight.block is not None
    if scale.shape[1] > 1 and weight.block[1] % _UNIT:
        return False
    return group is None or bool((torch.bincount(group.long(), minlength=scale.shape[1]) == weight.block[1]).all())


def _pack(weight: PackedWeight, activation: ActivationType, codes: bool) -> _native.Matrix | None:
    from amalgam import _native

    parts = {name: part.contiguous() for name, part in weight.parts.items()}
    scale, zero, group = parts.get("scale"), parts.get("zero"), parts.get("group")
    order = None if group is None else _order(group)
    rows, columns = weight.shape
    block = weight.block or (rows, columns)
    return _native.pack(
        format=_native.Format[_format_name(weight)],
        rows=rows,
        columns=columns,
        weight=parts["weight"].data_ptr(),
        scale=0 if scale is None else scale.data_ptr(),
        scale_dtype=native.native_dtype(torch.float32 if scale is None else scale.dtype),
        scale_rows=1 if scale is None else scale.shape[0],
        scale_columns=1 if scale is None else scale.shape[1],
        block_rows=block[0],
        block_columns=block[1],
        zero=0 if zero is None else zero.data_ptr(),
        order=0 if order is None else order.data_ptr(),
        quantizes=activation == "int8",
        codes=codes,
    )


def _order(group: Tensor) -> Tensor:
    """Inputs of a group side by side, in the order they have."""
    return torch.argsort(group.long(), stable=True).to(torch.int32)
