"""A packed weight in ggml's types: which of them hold its values as they are, and its rows as the bytes of one.

In: packed weights in any layout. Out: types with how true they are, bytes. Must never know: names, layers, which other
weights share a tensor with it.

Most quantized weights are integers times a scale for some neighbours of a row. Such a weight is in every type whose
codes reach far enough, and whose scale, a float16, is the same number:

    int4, groups of 32 n, zero at 8        Q4_0, Q5_0, Q8_0     a scale of 128 inputs is written four times
    int4 with zero points                  Q4_1 if zero × scale is a float16, else Q5_0, Q8_0
    int8 by channel, or in groups of 32 n  Q8_0
    MXFP4                                  MXFP4, and Q5_0, Q8_0 where its power of two is a float16

A scale that is no float16 is rounded (by 2^-11 of it at most); whatever else does not fit has to be rounded by value
(`amalgam.formats.gguf.rounding`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from amalgam.checkpoint.gguf_writer import FLOATS
from amalgam.formats.gguf import blocks, k_quants
from amalgam.formats.gguf.blocks import TYPES
from amalgam.formats.gguf.rounding import ROUNDED, fifth_bits, half_bytes, join_nibbles, round_to
from amalgam.kernels.layouts import unpack_nibbles
from amalgam.kernels.weights import PackedWeight

_GROUP = 32
_SUPER = 256
_RAW = {own.name: own.type.name for own in (*blocks.FORMATS, *k_quants.FORMATS)}
_SYMMETRIC = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
# Twice the values of E2M1 → their codes.
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
_MOST_BITS = 12  # of a weight of 8 bits and its scales
_SCALE_ERROR = 2.0**-10  # of a normal float16, with room


class Truth(IntEnum):
    """What becomes of a weight's values, the best first."""

    EXACT = 0
    SCALES = 1
    """Codes are the same, scales are rounded to float16."""
    VALUES = 2
    """Values are rounded."""


@dataclass(frozen=True)
class _Integers:
    """`codes × scale`.

    Attributes:
        codes: int16 `[rows, groups of 32, 32]`.
        scale: float32 `[rows, groups of 32]`.
        zero: int16 `[rows, groups of 32]`, what was subtracted from codes of 4 bits; None: nothing.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


def bits_of(kind: str) -> float:
    """Bits of a value, scales included."""
    return FLOATS[kind].itemsize * 8.0 if kind in FLOATS else TYPES[kind].num_bytes * 8 / TYPES[kind].num_elements


def kinds_of(weight: PackedWeight) -> dict[str, Truth]:
    """The types that hold a weight without its values being rounded, float32 aside, which holds all (`truth_in`)."""
    if weight.is_floating:
        return kinds_of_float(weight.parts["weight"].dtype)
    kinds: dict[str, Truth] = {}
    raw = _RAW.get(weight.layout.name)
    if raw is not None:
        kinds[raw] = Truth.EXACT
    integers = _integers(weight)
    if integers is None:
        return kinds
    truth = _truth_of(integers.scale)
    least, largest = int(integers.codes.min()), int(integers.codes.max())
    for kind, (low, high) in _SYMMETRIC.items():
        if truth is not None and low <= least and largest <= high:
            kinds.setdefault(kind, truth)
    if truth is not None and integers.zero is not None:
        minimum = _truth_of(_minimum(integers))
        if minimum is not None:
            kinds.setdefault("Q4_1", max(truth, minimum))
    if _e2m1(integers) is not None:
        kinds.setdefault("MXFP4", Truth.EXACT)
    return kinds


def kinds_of_float(dtype: torch.dtype) -> dict[str, Truth]:
    """The same of an unquantized weight."""
    return {name: Truth.EXACT for name, known in FLOATS.items() if known is dtype}


def truth_in(kinds: Mapping[str, Truth], kind: str) -> Truth:
    """What becomes of a weight's values in a type."""
    return Truth.EXACT if kind == "F32" else kinds.get(kind, Truth.VALUES)


def fallback_of(width: float, columns: int, wish: str | None) -> str:
    """The type for a weight whose values have to be rounded: the wish where its blocks divide the rows.

    Args:
        width: bits of a value that it has now, scales included.
        columns: values of a row.
    """
    if wish is not None and is_possible(wish, columns):
        return wish
    if width <= bits_of("Q6_K") and columns % _SUPER == 0:
        return "Q6_K"
    return "Q8_0" if width <= _MOST_BITS and columns % _GROUP == 0 else "F16"


def is_possible(kind: str, columns: int) -> bool:
    """Whether values can be rounded to a type in rows of so many."""
    return kind in FLOATS or (kind in ROUNDED and columns % TYPES[kind].num_elements == 0)


def choose(kinds: Sequence[Mapping[str, Truth]], fallbacks: Sequence[str], *, narrowest: bool = False) -> str:
    """One type for weights that share a tensor: the smallest that holds all of them, as wide as the widest has it.

    If none of the width of a quantized type does, the widest of the types that they would have alone; with `narrowest`
    the narrowest of these.
    """
    alone = [_best(each, fallback) for each, fallback in zip(kinds, fallbacks, strict=True)]
    if len(set(alone)) == 1:
        return alone[0]
    if narrowest:
        return min(alone, key=bits_of)
    if {"F16", "BF16"} <= set(alone):
        return "F32"
    widest = max(alone, key=bits_of)
    limit = max(bits_of("Q8_0"), bits_of(widest))
    shared = set.intersection(*(set(each) for each in kinds))
    fitting = [kind for kind in shared if bits_of(widest) <= bits_of(kind) <= limit]
    if fitting:
        return min(fitting, key=lambda kind: (max(each[kind] for each in kinds), bits_of(kind)))
    return widest if widest in FLOATS else max(widest, "Q8_0", key=bits_of)


def _best(kinds: Mapping[str, Truth], fallback: str) -> str:
    """The type of a weight alone: the truest, then the smallest."""
    return min(kinds, key=lambda kind: (kinds[kind], bits_of(kind)), default=fallback)


def rows_of(weight: PackedWeight, kind: str) -> Tensor:
    """A matrix's rows in a type, uint8 `[out, bytes of a row]`; values are rounded where they have to be."""
    rows = weight.shape[0]
    if kind in FLOATS:
        values = weight.dequantize(FLOATS[kind]).reshape(rows, -1).contiguous()
        return values.view(torch.uint8)
    if _RAW.get(weight.layout.name) == kind:
        return weight.parts["weight"].reshape(rows, -1)
    integers = None if weight.is_floating else _integers(weight)
    packed = None if integers is None else _carried(integers, kind)
    if packed is None:
        return round_to(weight.dequantize(torch.float32).reshape(rows, -1), kind)
    return packed.reshape(rows, -1)


# --- Integers ---


def _integers(weight: PackedWeight) -> _Integers | None:
    """The weight as integers in groups of 32, None if it is none."""
    if weight.layout.base is not None or len(weight.shape) != 2 or weight.shape[1] % _GROUP:
        return None
    reader = _READERS.get(weight.layout.name)
    return None if reader is None else reader(weight)


def _in_groups(codes: Tensor) -> Tensor:
    return codes.to(torch.int16).view(*codes.shape[:-1], -1, _GROUP)


def _spread(weight: PackedWeight, part: Tensor) -> Tensor | None:
    """A part with one number for each block → one for each 32 of each row; None if blocks cut these."""
    assert weight.block is not None
    (rows, columns), (height, width) = weight.shape, weight.block
    if part.shape[0] > 1:
        part = part.repeat_interleave(height, 0)[:rows]
    if part.shape[1] > 1:
        if width % _GROUP:
            return None
        part = part.repeat_interleave(width // _GROUP, 1)[:, : columns // _GROUP]
    return part.expand(rows, columns // _GROUP)


def _with_zeros(weight: PackedWeight, codes: Tensor, zero: Tensor | None, bits: int) -> _Integers | None:
    scale = _spread(weight, weight.parts["scale"].float())
    if scale is None or "group" in weight.parts:
        return None
    grouped = _in_groups(codes)
    if zero is None:
        return _Integers(grouped - (1 << (bits - 1)), scale)
    offset = _spread(weight, zero.float())
    if offset is None or bool((offset != offset.round()).any()) or float(offset.abs().max()) > 1 << bits:
        return None
    offset = offset.to(torch.int16)
    return _Integers(grouped - offset.unsqueeze(-1), scale, offset if bits == 4 else None)


def _int4(weight: PackedWeight) -> _Integers | None:
    return _with_zeros(weight, unpack_nibbles(weight.parts["weight"]), weight.parts.get("zero"), 4)


def _affine8(weight: PackedWeight) -> _Integers | None:
    return _with_zeros(weight, weight.parts["weight"], weight.parts["zero"], 8)


def _scaled8(weight: PackedWeight) -> _Integers | None:
    codes = weight.parts["weight"]
    scale = _spread(weight, weight.parts["scale"].float()) if codes.dtype is torch.int8 else None
    return None if scale is None else _Integers(_in_groups(codes), scale)


def _table4(weight: PackedWeight) -> _Integers | None:
    """Of E2M1's values: twice them are whole."""
    doubled = weight.parts["table"] * 2
    scale = _spread(weight, weight.parts["scale"].float() / 2)
    if scale is None or "factor" in weight.parts or "divisor" in weight.parts or bool((doubled % 1 != 0).any()):
        return None
    codes = doubled.to(torch.int16)[unpack_nibbles(weight.parts["weight"]).int()]
    return _Integers(_in_groups(codes), scale)


def _own(weight: PackedWeight) -> _Integers | None:
    """Of GGUF's own types of 32: those without a minimum."""
    assert weight.layout.split is not None
    parts = weight.layout.split(weight)
    scale = parts["scale"].float()
    if "table" not in parts:
        return _Integers(_in_groups(parts["weight"].to(torch.int16) - 16), scale)
    values = parts["table"][:16]
    factor = 1.0 if bool((values % 1 == 0).all()) else 2.0
    codes = (values * factor).to(torch.int16)[parts["weight"].int()]
    return _Integers(_in_groups(codes), scale / factor)


_READERS = {
    "int4": _int4,
    "affine4": _int4,
    "affine8": _affine8,
    "scaled8": _scaled8,
    "table4": _table4,
    **dict.fromkeys(("gguf_q5_0", "gguf_iq4_nl", "gguf_mxfp4"), _own),
}


def _truth_of(scale: Tensor) -> Truth | None:
    """Of numbers written as float16; None if some are too large or too small for it."""
    half = scale.to(torch.float16).float()
    if torch.equal(half, scale):
        return Truth.EXACT
    is_near = (half - scale).abs() <= _SCALE_ERROR * scale.abs()
    return Truth.SCALES if bool(half.isfinite().all()) and bool(is_near.all()) else None


def _minimum(integers: _Integers) -> Tensor:
    assert integers.zero is not None
    return -integers.zero.float() * integers.scale


def _e2m1(integers: _Integers) -> tuple[Tensor, Tensor] | None:
    """Codes uint8 and exponents uint8 as MXFP4 has them; None if the weight is no such one."""
    mantissa, exponent = torch.frexp(integers.scale)
    exponent = exponent + 127  # 2^(e - 128), and frexp's mantissa is a half
    if bool((mantissa != 0.5).any()) or int(exponent.min()) < 0 or int(exponent.max()) > 254:
        return None
    levels = torch.tensor(_E2M1_DOUBLED, dtype=torch.int16)
    magnitude = integers.codes.abs()
    index = torch.searchsorted(levels, magnitude.contiguous()).clamp(max=7)
    if not torch.equal(levels[index], magnitude):
        return None
    codes = index.to(torch.uint8) | ((integers.codes < 0).to(torch.uint8) << 3)
    return codes, exponent.to(torch.uint8)


def _carried(integers: _Integers, kind: str) -> Tensor | None:
    """Codes and scales in a type, uint8 `[groups, bytes]`; None if they do not fit."""
    codes, scale = integers.codes.reshape(-1, _GROUP), integers.scale.reshape(-1)
    if kind == "MXFP4":
        found = _e2m1(integers)
        if found is None:
            return None
        return torch.cat((found[1].reshape(-1, 1), join_nibbles(found[0].reshape(-1, _GROUP))), -1)
    if kind == "Q4_1":
        if integers.zero is None:
            return None
        unsigned = (codes + integers.zero.reshape(-1, 1)).to(torch.uint8)
        return torch.cat((half_bytes(scale), half_bytes(_minimum(integers)), join_nibbles(unsigned)), -1)
    low, high = _SYMMETRIC.get(kind, (1, 0))
    if int(codes.min()) < low or int(codes.max()) > high or _truth_of(scale) is None:
        return None
    if kind == "Q8_0":
        return torch.cat((half_bytes(scale), codes.to(torch.int8).view(torch.uint8)), -1)
    unsigned = (codes - low).to(torch.uint8)
    if kind == "Q4_0":
        return torch.cat((half_bytes(scale), join_nibbles(unsigned)), -1)
    return torch.cat((half_bytes(scale), fifth_bits(unsigned), join_nibbles(unsigned & 15)), -1)
