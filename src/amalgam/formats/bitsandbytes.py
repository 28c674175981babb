"""bitsandbytes: NF4 and FP4 (Dettmers et al. 2023, QLoRA), and LLM.int8 (Dettmers et al. 2022).

4 bits, for a weight `x.weight` with n = out × in elements, flattened row by row; blocks may cross rows:

    x.weight                                 uint8 [ceil(n / 2), 1] (or those bytes as another type);
                                             element 2k in the HIGH nibble of byte k
    x.weight.absmax                          float32 [blocks], or uint8 when nested
    x.weight.quant_map                       float32 [16]
    x.weight.quant_state.bitsandbytes__nf4   uint8, JSON: shape, blocksize, and of the nested scales their blocksize
                                             and offset
    x.weight.nested_absmax, nested_quant_map float32 [blocks of blocks], [256]

`w[e] = quant_map[code] × a[e // blocksize]`, nested `a[b] = nested_quant_map[absmax[b]] × nested_absmax[b // 256] +
offset`. 8 bits: `weight` int8 [out, in], `SCB` float32 [out], `w = weight × (SCB / 127)`; outliers exist only at run
time. The library multiplies by SCB first, then by 1 / 127: its float32 differs by one unit in the last place at most.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amalgam.base.strict_json import parse_foreign_json
from amalgam.formats.contract import (
    WEIGHT_SUFFIX,
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
    expect_dtype,
    expect_shape,
    finite,
    owned,
    refuse_part,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import SCALED8, TABLE4
from amalgam.kernels.weights import PackedWeight

_ABSMAX, _MAP = "weight.absmax", "weight.quant_map"
_NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
_MAX_STATE_BYTES = 4096
_METHODS = frozenset({"bitsandbytes"})


@dataclass(frozen=True)
class _State:
    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float


class BitsAndBytes4(WeightFormat):
    """NF4 or FP4: a table of 16 values, and a scale per block."""

    layouts = (TABLE4,)

    methods = _METHODS
    bits = 4

    def __init__(self, kind: str) -> None:
        self.name = f"bnb-{kind}"
        self._state = f"weight.quant_state.bitsandbytes__{kind}"
        self._kind = kind
        self.required = frozenset({WEIGHT_SUFFIX, _ABSMAX, _MAP, self._state})
        self.optional = frozenset(_NESTED)

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        weight, absmax = parts[WEIGHT_SUFFIX], parts[_ABSMAX]
        state = self._read_state(name, parts[self._state], context.read)
        count = math.prod(state.shape)
        blocks = -(-count // state.block)
        if weight.nbytes != -(-count // 2):
            refuse_part(name, weight, f"{count} elements of 4 bits take {-(-count // 2)} bytes.")
        if state.shape[1] % 2:
            refuse_part(name, weight, "An odd number of inputs is not supported.")
        expect_shape(name, absmax, (blocks,))
        expect_dtype(name, parts[_MAP], (torch.float32,))
        expect_shape(name, parts[_MAP], (16,))
        nested = [role for role in _NESTED if role in parts]
        expect_dtype(name, absmax, (torch.uint8,) if nested else (torch.float32,))
        if nested:
            if len(nested) != 2:
                refuse_part(name, absmax, f"Nested scales need {' and '.join(_NESTED)}.")
            for role, shape in zip(_NESTED, ((-(-blocks // state.nested_block),), (256,)), strict=True):
                expect_dtype(name, parts[role], (torch.float32,))
                expect_shape(name, parts[role], shape)
        # Blocks may cross rows; within this many inputs all share one.
        group = math.gcd(state.shape[1], state.block)
        return StoredWeight(name, self, state.shape, parts, (1, group), 4)

    def _read_state(self, name: str, part: TensorPart, read: Read) -> _State:
        if part.dtype != torch.uint8 or part.nbytes > _MAX_STATE_BYTES:
            refuse_part(name, part, f"Expected at most {_MAX_STATE_BYTES} bytes of JSON.")
        found: Any = parse_foreign_json(
            bytes(read(part).contiguous().numpy()), f"Tensor {part.name!r} in {part.file.name}"
        )
        values = found if isinstance(found, dict) else {}
        shape, offset = values.get("shape"), values.get("nested_offset", 0.0)
        sizes = [values.get("blocksize"), values.get("nested_blocksize", 256)]
        is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(s) is int and 0 < s < 2**31 for s in shape)
        if (
            not is_shape
            or not all(type(size) is int and 0 < size < 2**20 for size in sizes)
            or not isinstance(offset, int | float)
            or values.get("quant_type") != self._kind
        ):
            refuse_part(
                name, part, f"Its JSON must give shape, blocksize and quant_type {self._kind!r}; it is {found!r:.200}."
            )
        assert isinstance(shape, list)
        return _State((shape[0], shape[1]), int(sizes[0]), int(sizes[1]), float(offset))

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        assert stored.block is not None
        rows, columns = stored.shape
        state = self._read_state(stored.name, stored.parts[self._state], read)
        swapped = read(stored.parts[WEIGHT_SUFFIX]).contiguous().view(torch.uint8).view(rows, columns // 2)
        starts = torch.arange(0, rows * columns, stored.block[1]) // state.block
        parts = {
            "weight": swapped << 4 | swapped >> 4,
            "scale": self._absmax(stored, state, read)[starts].view(rows, columns // stored.block[1]),
            "table": owned(finite(stored, _MAP, read(stored.parts[_MAP]))),
        }
        return PackedWeight(TABLE4, stored.shape, parts, stored.block)

    def _absmax(self, stored: StoredWeight, state: _State, read: Read) -> Tensor:
        absmax = read(stored.parts[_ABSMAX])
        if _NESTED[0] not in stored.parts:
            return finite(stored, _ABSMAX, absmax)
        outer, table = (finite(stored, role, read(stored.parts[role])) for role in _NESTED)
        scales = outer.repeat_interleave(state.nested_block)[: absmax.numel()]
        return table[absmax.int()] * scales + torch.tensor(state.offset, dtype=torch.float32)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        rows, columns = shape
        return rows * columns // 2 + 4 * rows * (columns // math.gcd(columns, 64)) + 64


class BitsAndBytes8(WeightFormat):
    """LLM.int8: rows of int8 and the largest magnitude of each."""

    layouts = (SCALED8,)
    name = "bnb-int8"
    required = frozenset({WEIGHT_SUFFIX, "SCB"})
    optional = frozenset({"weight_format"})
    methods = _METHODS
    number = "int"
    bits = 8

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        weight, largest = parts[WEIGHT_SUFFIX], parts["SCB"]
        expect_dtype(name, weight, (torch.int8,))
        if len(weight.shape) != 2 or 0 in weight.shape:
            refuse_part(name, weight, "Expected [out, in].")
        expect_dtype(name, largest, (torch.float32,))
        expect_shape(name, largest, (weight.shape[0],))
        if "weight_format" in parts:
            expect_dtype(name, parts["weight_format"], (torch.uint8,))
            if math.prod(parts["weight_format"].shape) != 1:
                refuse_part(name, parts["weight_format"], "Expected one element.")
        return StoredWeight(name, self, weight.shape, parts, (1, weight.shape[1]), 8)

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return 0 if role == "weight_format" else 1

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        if "weight_format" in stored.parts and (order := int(read(stored.parts["weight_format"]))) != 0:
            refuse_part(
                stored.name,
                stored.parts["weight_format"],
                f"It says {order}: the order of a GPU's tiles. Only rows (0) are served: save the model again with a "
                "current bitsandbytes.",
            )
        largest = finite(stored, "SCB", read(stored.parts["SCB"]))
        parts = {"weight": owned(read(stored.parts[WEIGHT_SUFFIX])), "scale": (largest / 127).view(-1, 1)}
        return PackedWeight(SCALED8, stored.shape, parts, stored.block)

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        return math.prod(shape) + 4 * shape[0]


FORMATS = (BitsAndBytes4("nf4"), BitsAndBytes4("fp4"), BitsAndBytes8())
