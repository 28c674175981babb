"""What a kernel is compiled for: how the bytes of a weight are read, and in tiles of which shape.

In: packed weights. Out: `Kind`, and tables of pointers to weights of one kind. Must never know: names, plans, requests.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from amalgam.kernels.layouts import AFFINE8, DENSE, E2M1, SCALED8, TABLE4, TRITON_LAYOUTS
from amalgam.kernels.weights import PackedWeight

# Rows of a table of pointers, a column for each weight; 0 for what it has not. ROWS is no pointer but how many it has.
WEIGHT, SCALE, ZERO, GROUP, TABLE, FACTOR, BIAS, ROWS, FIELDS = (tl.constexpr(row) for row in range(9))

Values = Literal["float", "e4m3", "int8", "nibble", "byte", "e2m1", "table"]
Factor = Literal["", "factor", "divisor"]
# Where scales enter. The sums are multiplied: once at the end, or after each step of inputs. Or values are, before they
# are rounded to what is multiplied: in equal parts of a step, or each by the scale of its own input.
Scaling = Literal["none", "end", "step", "parts", "each"]

_FLOATS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_TORCH = {ours: theirs for theirs, ours in _FLOATS.items()}
_SCALES = {**_FLOATS, torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e8m0fnu: tl.uint8}
_ZEROS = {**_FLOATS, torch.uint8: tl.uint8}
_BYTES_OF_A_LOAD = 16
_ALL = 1 << 30  # of the rows, or of the inputs


@dataclass(frozen=True)
class Kind:
    """How a weight's bytes are read.

    Attributes:
        values: what they are.
        inputs: of the weight, `in`.
        floats: the type of floating values.
        scale: type of the scales; uint8 stands for e8m0, which Triton has not. None: there are none.
        zero: type of the zero points; None: there are none.
        block: rows and columns that share a scale.
        ordered: each input says its group.
        factor: whether scales have a factor or a divisor that all share.
        is_native: whether the card expands e4m3 in an instruction.
        scaling, step: how scales enter in steps of so many inputs.
    """

    values: Values
    inputs: int
    floats: Any = None
    scale: Any = None
    zero: Any = None
    block: tuple[int, int] = (1, 1)
    ordered: bool = False
    factor: Factor = ""
    is_native: bool = False
    scaling: Scaling = "none"
    step: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether every value without its scale is one of bfloat16 and of float16."""
        is_affine = self.zero is not None and self.zero is not tl.uint8
        return self.values in ("e4m3", "int8", "nibble", "e2m1") and not is_affine

    @property
    def columns(self) -> int:
        """Of scales, in a row of them."""
        return -(-self.inputs // self.block[1])

    @property
    def is_narrow(self) -> bool:
        """Whether a byte holds two values."""
        return self.values in ("nibble", "e2m1", "table")

    def of(self, inputs: int) -> Kind:
        """The same for weights of so many inputs."""
        return replace(self, inputs=inputs, block=(self.block[0], min(self.block[1], inputs)))


# As models are published; what `VARIANTS` are of, those of `COMMON` in more sizes.
COMMON = ("bf16", "fp8", "int4", "MXFP4")
PUBLISHED = {
    "bf16": Kind("float", _ALL, tl.bfloat16),
    "fp8": Kind("e4m3", _ALL, scale=tl.float32, block=(128, 128)),
    "fp8 by row": Kind("e4m3", _ALL, scale=tl.bfloat16, block=(1, _ALL)),
    "int8": Kind("int8", _ALL, scale=tl.bfloat16, block=(1, _ALL)),
    "int4": Kind("nibble", _ALL, scale=tl.float16, block=(1, 128)),
    "int4 with zeros": Kind("nibble", _ALL, scale=tl.float16, zero=tl.uint8, block=(1, 128)),
    "int4 in an order": Kind("nibble", _ALL, scale=tl.float16, zero=tl.uint8, block=(1, 128), ordered=True),
    "HQQ": Kind("nibble", _ALL, scale=tl.float16, zero=tl.float16, block=(1, 64)),
    "MXFP4": Kind("e2m1", _ALL, scale=tl.uint8, block=(1, 32)),
    "NVFP4": Kind("e2m1", _ALL, scale=tl.float8e4nv, block=(1, 16), factor="factor"),
    "NF4": Kind("table", _ALL, scale=tl.float32, block=(1, 64)),
}


def in_steps(kind: Kind, step: int) -> Kind:
    """A kind that is read so many inputs at a time."""
    group = kind.block[1]
    if kind.scale is None:
        scaling: Scaling = "none"
    elif kind.ordered:
        scaling = "each"
    elif kind.is_exact and kind.columns == 1:
        scaling = "end"
    elif kind.is_exact and group % step == 0:
        scaling = "step"
    elif group % step == 0 or (step % group == 0 and group >= 8):
        scaling = "parts"
    else:
        scaling = "each"
    return replace(kind, scaling=scaling, step=step)


def step_of(kinds: Iterable[Kind]) -> int:
    """How many inputs kernels read at a time, of weights of these kinds; a matter of weights and never of rows."""
    return min(_step_of(kind) for kind in kinds)


def _step_of(kind: Kind) -> int:
    if kind.values == "float":
        return 1024 // int(kind.floats.primitive_bitwidth)
    if kind.ordered:
        return 32  # a scale and a zero point for each value are more than registers hold
    if kind.is_exact and kind.columns > 1 and kind.block[1] % 64 == 0 and kind.block[1] % 128:
        return 64
    return 128


def kind_of(weight: PackedWeight) -> Kind | None:
    """How kernels read a weight; None if they do not. Looks at a table's values, which waits for the device."""
    if len(weight.shape) != 2 or weight.layout not in TRITON_LAYOUTS:
        return None
    values, inputs, block = weight.parts["weight"], weight.shape[1], weight.block or (1, 1)
    if weight.layout is DENSE:
        return Kind("float", inputs, _FLOATS[values.dtype]) if values.dtype in _FLOATS else None
    scale = _SCALES.get(weight.parts["scale"].dtype) if "scale" in weight.parts else None
    if scale is None:
        return None
    if weight.layout is SCALED8:
        names: dict[torch.dtype, Values] = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}
        name = names.get(values.dtype)
        rows, columns = weight.parts["scale"].shape
        block = (_ALL if rows == 1 else block[0], inputs if columns == 1 else block[1])
        is_native = name == "e4m3" and expands_e4m3(_capability(values.device))
        return None if name is None else Kind(name, inputs, scale=scale, block=block, is_native=is_native)
    if weight.layout is TABLE4:
        if {"factor", "divisor"} <= weight.parts.keys():
            return None
        factor: Factor = "factor" if "factor" in weight.parts else "divisor" if "divisor" in weight.parts else ""
        is_e2m1 = weight.parts["table"].tolist() == list(E2M1)
        return Kind("e2m1" if is_e2m1 else "table", inputs, scale=scale, block=block, factor=factor)
    zero = _ZEROS.get(weight.parts["zero"].dtype) if "zero" in weight.parts else None
    if zero is None and "zero" in weight.parts:
        return None
    codes: Values = "byte" if weight.layout is AFFINE8 else "nibble"
    return Kind(codes, inputs, scale=scale, zero=zero, block=block, ordered="group" in weight.parts)


@dataclass(frozen=True, eq=False)
class TritonWeight(PackedWeight):
    """A weight that kernels read where it lies, in its own layout.

    Attributes:
        kind: how.
    """

    kind: Kind = field(kw_only=True)

    @classmethod
    def of(cls, weight: PackedWeight) -> PackedWeight:
        """The weight, ready to be read; itself if no kernel reads it."""
        kind = kind_of(weight)
        if kind is None:
            return weight
        parts = {name: _aligned(part) for name, part in weight.parts.items()}
        return cls(weight.layout, weight.shape, parts, weight.block, kind=kind)


def _aligned(part: Tensor) -> Tensor:
    """Contiguous, and where loads of many bytes are allowed."""
    part = part.contiguous()
    return part.clone() if part.data_ptr() % _BYTES_OF_A_LOAD else part


def pointers_of(weight: TritonWeight, bias: Tensor | None) -> list[int]:
    """A weight's column of a table of pointers. bias: float32, contiguous."""
    part = weight.parts
    factor = part.get("factor", part.get("divisor"))
    tensors = (part["weight"], part.get("scale"), part.get("zero"), part.get("group"), part.get("table"), factor, bias)
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors] + [weight.shape[0]]


def compute_type(dtype: torch.dtype, *kinds: Kind) -> Any:
    """What rows of a type and weights of some kinds are multiplied in: the rows' type, or a wider one of a weight's."""
    for kind in kinds:
        if kind.values == "float":
            dtype = torch.promote_types(dtype, _TORCH[kind.floats])
    return _FLOATS[dtype]


def expands_e4m3(capability: int) -> bool:
    """Whether a card of a compute capability, 90 for 9.0, expands e4m3 in an instruction."""
    return capability >= 89


@functools.cache
def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def wide_biases(weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Biases in float32; zeros for those that are missing beside others, none where all are."""
    if all(bias is None for bias in biases):
        return [None] * len(biases)
    return [
        torch.zeros(weight.shape[0], device=weight.parts["weight"].device) if bias is None else _aligned(bias.float())
        for weight, bias in zip(weights, biases, strict=True)
    ]


def kinds_of(weights: Sequence[PackedWeight]) -> list[Kind]:
    """Of weights that kernels read, each kind once, in the order in which they come."""
    return list(dict.fromkeys(weight.kind for weight in weights if isinstance(weight, TritonWeight)))


@dataclass(frozen=True)
class Tile:
    """What one program of a launch computes, and with how much.

    Attributes:
        rows: of activations.
        outputs: of each weight.
    """

    rows: int
    outputs: int
    num_warps: int
    num_stages: int


def tile_for(rows: int, *kinds: Kind, is_wide: bool = False) -> Tile:
    """For products of about so many rows with weights of these kinds, of which a program multiplies one each.

    Which inputs are summed in which order does not depend on it. Codes are expanded in registers. A Hopper card's own
    instruction for that wants four warps and reads codes byte by byte; with two, Triton takes the one of older cards,
    which reads 16 bytes at a time. More warps than that are for want of registers.

    Args:
        is_wide: products are of float32, which no such instruction takes: all operands are in registers.
    """
    if is_wide:
        return Tile(8 if rows <= 8 else 16, 32, 4, 3)
    is_coded = any(kind.values != "float" for kind in kinds)
    if rows > 32:
        height = 128 if rows > 64 and not is_coded else 64
        return Tile(height, 128 // max(1, len(kinds)), 8 if is_coded or height == 128 else 4, 3)
    height = max(8, 1 << (rows - 1).bit_length())
    return Tile(height, 64, 2 if is_coded and height < 32 else 4, 4)
