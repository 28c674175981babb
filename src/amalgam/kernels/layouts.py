"""The registry of runtime layouts: what the values of a weight look like in memory, and what they mean.

In: a packed weight. Out: its values in float32. Must never know: checkpoint names, plans, requests.

All are row-major over `[out, in]`:

    dense     weight: float [out, in] (or any shape for embeddings, norms, biases)
    scaled8   weight: float8_e4m3fn or int8 [out, in]
              scale:  float or float8_e8m0fnu [ceil(out / block_rows), ceil(in / block_columns)]
    int4      weight: uint8 [out, in / 2], input 2k in the low nibble of byte k and 2k + 1 in the high one
              scale:  float [out, in / group_size]
              zero:   uint8 [out, in / group_size], absent when symmetric (then 8)
              group:  int32 [in], the group of each input; absent when input i is in group i // group_size
    affine4   as int4, but zero: float, always present (HQQ)
    affine8   weight: uint8 [out, in]; scale, zero (float, always present) and group as affine4
    cyclic4   weight as int4; scale, zero: float [cycle], both for element e in row-major order at e % cycle
    cyclic8   weight: uint8 [out, in]; scale, zero as cyclic4
    table4    weight as int4, an index into table: float32 [16] (NF4, FP4, MXFP4, NVFP4)
              scale:  float, float8_e4m3fn or float8_e8m0fnu [out, in / group_size]
              factor: float32 [], multiplies every scale, or divisor: float32 [], divides every scale; or neither
    codebooks weight:    int8 or int16 [out / r, in / c, books], codes modulo the vectors of a book, a power of two
              codebooks: float [books, vectors, r, c]; r rows and c inputs are the sum of a vector from each book (AQLM)
              scale:     float [out / r, 1]
    X_columns layout X and columns: float32 [in], which multiply the expanded weight (ModelOpt's pre_quant_scale)

    panels_*  what the CPU backend reads: int1 to int5, int8, fp8, bf16, fp16, fp32 (`csrc` has the drawings)
              weight: uint8, the panels' lines; scale: [panels, groups, 16 or 1]; zero: uint8 [panels, groups, 16]; or
              of scale's type, zero, or minimum, for which a value is code × scale + minimum
    panels_k* the same for groups of 256 with scale and minimum, cut into parts of 16 or 32 that have integer ones
              part: uint8, the integers
    panels_table4, panels_k_table4, panels_float_table4  the same for nibbles that look up a table
              table: float32 [18], 16 values, in the first two int8 or halves of one; a factor and a divisor of scales
    panels_codebooks  the same for codes of vectors
              weight: uint8, the panels' codes; codebooks: float [books, vectors, c]
    panels_bf16_coded  the same for bf16 in 12 bits a value, without loss
              weight: uint8, the panels' lines; exceptions: uint8, what the code has no place for, and where it is

A format may bring a `Layout` of its own. It works through the function that expands it. Nothing is assumed of its
parts, and no packed cache takes it, for nobody could find that function again by the layout's name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.kernels.weights import Layout, PackedWeight, Unpack

# OCP E2M1: sign, two bits of exponent, one of mantissa.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """uint8 `[rows, n]` → uint8 `[rows, 2n]`, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def pack_nibbles(values: Tensor) -> Tensor:
    """uint8 `[rows, 2n]` with values below 16 → uint8 `[rows, n]`, the low nibble first."""
    pairs = values.view(*values.shape[:-1], -1, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


# --- What the bits mean ---


def _dense(weight: PackedWeight) -> Tensor:
    """The stored tensor itself."""
    return weight.parts["weight"]


def _scaled8(weight: PackedWeight) -> Tensor:
    """`value × scale` in float32, scale repeated over blocks of `weight.block` and cropped at the edges."""
    assert weight.block is not None
    rows, columns = weight.shape
    scale = weight.parts["scale"].float()
    if scale.shape[0] > 1:
        scale = scale.repeat_interleave(weight.block[0], 0)[:rows]
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(weight.block[1], 1)[:, :columns]
    return weight.parts["weight"].float() * scale


def _int4(weight: PackedWeight) -> Tensor:
    """`(nibble - zero) × scale` in float32."""
    assert weight.block is not None
    nibbles = unpack_nibbles(weight.parts["weight"])
    scale = weight.parts["scale"].float()
    zero = weight.parts.get("zero")
    group = weight.parts.get("group")
    if group is not None:
        index = group.long()
        offset: Tensor | float = zero.float()[:, index] if zero is not None else 8.0
        return (nibbles.float() - offset) * scale[:, index]
    rows, columns = weight.shape
    grouped = nibbles.float().view(rows, columns // weight.block[1], weight.block[1])
    offset = zero.float().unsqueeze(-1) if zero is not None else 8.0
    return ((grouped - offset) * scale.unsqueeze(-1)).view(rows, columns)


def _affine4(weight: PackedWeight) -> Tensor:
    """`(nibble - zero) × scale` with a floating zero."""
    return _affine(unpack_nibbles(weight.parts["weight"]), weight)


def _affine8(weight: PackedWeight) -> Tensor:
    """`(byte - zero) × scale` with a floating zero."""
    return _affine(weight.parts["weight"], weight)


def _affine(codes: Tensor, weight: PackedWeight) -> Tensor:
    assert weight.block is not None
    scale, zero = weight.parts["scale"].float(), weight.parts["zero"].float()
    group = weight.parts.get("group")
    if group is not None:
        index = group.long()
        return (codes.float() - zero[:, index]) * scale[:, index]
    rows, columns = weight.shape
    grouped = codes.float().view(rows, columns // weight.block[1], weight.block[1])
    return ((grouped - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).view(rows, columns)


def _cyclic4(weight: PackedWeight) -> Tensor:
    """`(nibble - zero) × scale`, scales repeating every so many elements in row-major order."""
    return _cyclic(unpack_nibbles(weight.parts["weight"]), weight)


def _cyclic8(weight: PackedWeight) -> Tensor:
    """`(byte - zero) × scale`, scales repeating every so many elements in row-major order."""
    return _cyclic(weight.parts["weight"], weight)


def _cyclic(codes: Tensor, weight: PackedWeight) -> Tensor:
    scale, zero = weight.parts["scale"].float(), weight.parts["zero"].float()
    return ((codes.float().view(-1, scale.numel()) - zero) * scale).view(weight.shape)


def _table4(weight: PackedWeight) -> Tensor:
    """`table[nibble] × scale`, the scale multiplied by `factor` or divided by `divisor` first."""
    assert weight.block is not None
    rows, columns = weight.shape
    scale = weight.parts["scale"].float()
    if "factor" in weight.parts:
        scale = scale * weight.parts["factor"]
    if "divisor" in weight.parts:
        scale = scale / weight.parts["divisor"]
    values = weight.parts["table"][unpack_nibbles(weight.parts["weight"]).int()]
    return (values.view(rows, columns // weight.block[1], weight.block[1]) * scale.unsqueeze(-1)).view(rows, columns)


def _codebooks(weight: PackedWeight) -> Tensor:
    """The vectors that codes choose, added up in the order of the books, times the scale; in float32."""
    codes, books = weight.parts["weight"], weight.parts["codebooks"]
    vectors = torch.zeros(())
    for index, book in enumerate(books.float().flatten(2)):
        chosen = book[codes[..., index].int() & (len(book) - 1)]
        vectors = chosen if index == 0 else vectors.add_(chosen)
    blocks: Tensor = (vectors * weight.parts["scale"].float().unsqueeze(-1)).unflatten(-1, books.shape[2:])
    return blocks.transpose(1, 2).reshape(weight.shape)


def _split_affine8(weight: PackedWeight) -> Mapping[str, Tensor]:
    """Codes less 128, as panels of int8 take them."""
    return {**weight.parts, "weight": (weight.parts["weight"] ^ 128).view(torch.int8)}


def _split_table4(weight: PackedWeight) -> Mapping[str, Tensor]:
    """A byte for each index, and the table with factor and divisor behind it."""
    ones = torch.ones(1)
    factors = (weight.parts.get(name, ones).reshape(1) for name in ("factor", "divisor"))
    return {
        "weight": unpack_nibbles(weight.parts["weight"]),
        "scale": weight.parts["scale"],
        "table": torch.cat((weight.parts["table"], *factors)),
    }


@dataclass(frozen=True)
class _Columns:
    """Expands with another layout's function, then multiplies input i by `columns[i]`."""

    inner: Unpack

    def __call__(self, weight: PackedWeight) -> Tensor:
        return self.inner(weight) * weight.parts["columns"]


# --- The table ---


def _panels(name: str, *parts: str, optional: Iterable[str] = (), dtype: torch.dtype | None = None) -> Layout:
    """Of the CPU backend, whose weights expand themselves."""
    is_floating = dtype is not None
    return Layout(
        f"panels_{name}",
        None,
        frozenset({"weight", *parts}),
        frozenset(optional),
        is_floating=is_floating,
        dtype=dtype,
        reader="cpu",
    )


_VALUES = frozenset({"weight"})
_SCALED = frozenset({"weight", "scale"})
_AFFINE = frozenset({"weight", "scale", "zero"})
_GROUP = frozenset({"group"})
_FACTORS = frozenset({"factor", "divisor"})

_OFFSETS = ("group", "zero", "minimum")
PANELS_INT1 = _panels("int1", "scale", optional=_OFFSETS)
PANELS_INT2 = _panels("int2", "scale", optional=_OFFSETS)
PANELS_INT3 = _panels("int3", "scale", optional=_OFFSETS)
PANELS_INT4 = _panels("int4", "scale", optional=_OFFSETS)
PANELS_INT5 = _panels("int5", "scale", optional=_OFFSETS)
PANELS_INT8 = _panels("int8", "scale", optional=("zero", "minimum"))  # its lines do not take an order of inputs
PANELS_K2 = _panels("k2", "scale", "minimum", "part")
PANELS_K3 = _panels("k3", "scale", "part")
PANELS_K4 = _panels("k4", "scale", "minimum", "part")
PANELS_K5 = _panels("k5", "scale", "minimum", "part")
PANELS_K6 = _panels("k6", "scale", "part")
PANELS_TABLE4 = _panels("table4", "scale", "table")
PANELS_FLOAT_TABLE4 = _panels("float_table4", "scale", "table")
PANELS_K_TABLE4 = _panels("k_table4", "scale", "part", "table")
PANELS_CODEBOOKS = _panels("codebooks", "scale", "codebooks")
PANELS_FP8 = _panels("fp8", "scale")
PANELS_BF16 = _panels("bf16", dtype=torch.bfloat16)
PANELS_BF16_CODED = _panels("bf16_coded", "exceptions", dtype=torch.bfloat16)
PANELS_FP16 = _panels("fp16", dtype=torch.float16)
PANELS_FP32 = _panels("fp32", dtype=torch.float32)

DENSE = Layout(
    "dense",
    _dense,
    _VALUES,
    has_rows=True,
    is_floating=True,
    panels={torch.bfloat16: PANELS_BF16, torch.float16: PANELS_FP16, torch.float32: PANELS_FP32},
)
SCALED8 = Layout(
    "scaled8", _scaled8, _SCALED, has_rows=True, panels={torch.float8_e4m3fn: PANELS_FP8, torch.int8: PANELS_INT8}
)
INT4 = Layout(
    "int4", _int4, _SCALED, _GROUP | {"zero"}, shared=_GROUP, has_rows=True, panels={torch.uint8: PANELS_INT4}
)
AFFINE4 = Layout("affine4", _affine4, _AFFINE, _GROUP, shared=_GROUP, has_rows=True, panels={torch.uint8: PANELS_INT4})
AFFINE8 = Layout(
    "affine8",
    _affine8,
    _AFFINE,
    _GROUP,
    shared=_GROUP,
    has_rows=True,
    panels={torch.uint8: PANELS_INT8},
    split=_split_affine8,
)
CYCLIC4 = Layout("cyclic4", _cyclic4, _AFFINE)
CYCLIC8 = Layout("cyclic8", _cyclic8, _AFFINE)
TABLE4 = Layout(
    "table4",
    _table4,
    _SCALED | {"table"},
    _FACTORS,
    shared=_FACTORS | {"table"},
    has_rows=True,
    panels={torch.uint8: PANELS_TABLE4},
    split=_split_table4,
)
CODEBOOKS = Layout(
    "codebooks",
    _codebooks,
    _SCALED | {"codebooks"},
    shared=frozenset({"codebooks"}),
    has_rows=True,
    panels={torch.int8: PANELS_CODEBOOKS, torch.int16: PANELS_CODEBOOKS},
)


def dense(tensor: Tensor) -> PackedWeight:
    """A floating tensor of any shape as a packed weight."""
    return PackedWeight(DENSE, tuple(tensor.shape), {"weight": tensor})


@functools.cache
def with_columns(layout: Layout) -> Layout:
    """The layout of `scale_columns`' weights."""
    assert layout.unpack is not None
    return Layout(
        f"{layout.name}_columns",
        _Columns(layout.unpack),
        layout.parts | {"columns"},
        layout.optional,
        shared=layout.shared | {"columns"},
        has_rows=layout.has_rows,
        base=layout,
    )


def scale_columns(weight: PackedWeight, columns: Tensor) -> PackedWeight:
    """A weight whose inputs are multiplied by `columns` (float32 `[in]`) after it is expanded."""
    parts = {**weight.parts, "columns": columns.to(torch.float32)}
    return PackedWeight(with_columns(weight.layout), weight.shape, parts, weight.block)


_QUANTIZED = (SCALED8, INT4, AFFINE4, AFFINE8, CYCLIC4, CYCLIC8, TABLE4, CODEBOOKS)
_PANELS = (
    *(PANELS_INT1, PANELS_INT2, PANELS_INT3, PANELS_INT4, PANELS_INT5, PANELS_INT8),
    *(PANELS_FP8, PANELS_BF16, PANELS_BF16_CODED, PANELS_FP16, PANELS_FP32),
    *(PANELS_K2, PANELS_K3, PANELS_K4, PANELS_K5, PANELS_K6, PANELS_TABLE4, PANELS_K_TABLE4, PANELS_FLOAT_TABLE4),
    PANELS_CODEBOOKS,
)
# Those that the Triton backend multiplies as they are; of fp8 and int8, and with one table of factors.
TRITON_LAYOUTS = frozenset({DENSE, SCALED8, INT4, AFFINE4, AFFINE8, TABLE4})
# By name; what a packed cache can hold.
LAYOUTS: Mapping[str, Layout] = {
    layout.name: layout for layout in (DENSE, *_QUANTIZED, *map(with_columns, _QUANTIZED), *_PANELS)
}


def is_known(layout: Layout) -> bool:
    """Whether it is one of the table, and not a format's own."""
    return LAYOUTS.get(layout.name) is layout
