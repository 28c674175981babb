"""The weights that kernels read.

In: tensors in one of the runtime layouts below. Out: nothing; these are nouns.
Must never know: checkpoint names, files, plans, layers.

Runtime layouts (`PackedWeight.layout`), all row-major over `[out, in]`:

    dense     weight: float [out, in] (or any shape for embeddings, norms, biases)
    scaled8   weight: float8_e4m3fn or int8 [out, in]
              scale:  float32 [ceil(out / block_rows), ceil(in / block_columns)]
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
    X_columns layout X and columns: float32 [in], which multiply the expanded weight (ModelOpt's pre_quant_scale)
    gguf_*    weight: uint8 [out, row_bytes], rows of ggml blocks (`formats.gguf`)

    panels_*  what the native CPU kernels read: int4, int8, fp8, bf16, fp16, fp32 (`csrc/matrix.h` has the drawing)
              weight: uint8, the panels' lines; scale: [panels, groups, 16 or 1]; zero: uint8 [panels, groups, 16]
    panels_bf16_coded  the same for bf16 in 12 bits a value, without loss (`csrc/coded.h`)
              weight: uint8, the panels' lines; exceptions: uint8, what the code has no place for, and where it is

A layout that no kernel knows still works: every packed weight carries the function that expands it. Nothing is assumed
of such a layout's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Unpack = Callable[["PackedWeight"], Tensor]

FLOATING_LAYOUTS = frozenset({"dense", "panels_bf16", "panels_bf16_coded", "panels_fp16", "panels_fp32"})
_LAYOUTS_OF_ROWS = frozenset({"scaled8", "int4", "affine4", "affine8", "table4"})
_SHARED_BY_ROWS = frozenset({"group", "columns", "table", "factor", "divisor"})


def consists_of_rows(layout: str) -> bool:
    """Whether all parts of a layout but those that the rows share have the rows first; False of foreign ones."""
    return layout.removesuffix("_columns") in _LAYOUTS_OF_ROWS or layout.startswith("gguf_")


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight in a runtime layout, immutable and shared between weight versions.

    Attributes:
        layout: name of the arrangement; kernels dispatch on it.
        shape: logical shape, `(out, in)` for a linear weight.
        parts: the tensors, named as in the module docstring.
        block: `(rows, columns)` that share one scale; `(1, group_size)` for layouts with groups.
        unpack: expands to the logical shape in float32 (floating layouts: in their own type); the weight's meaning.
        native: what the compiled kernels know it by; None in layouts that are not theirs.
        is_mapped: its bytes are a file's pages, which the system can give up and read again.
    """

    layout: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    unpack: Unpack
    block: tuple[int, int] | None = None
    native: object = None
    is_mapped: bool = False

    @property
    def is_floating(self) -> bool:
        """Whether the values are stored as they are, in a floating type of their own."""
        return self.layout in FLOATING_LAYOUTS

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def has_own_rows(self) -> bool:
        """Whether every row has values and scales of its own, so that it can be expanded alone."""
        return self.native is None and consists_of_rows(self.layout) and (self.block is None or self.block[0] == 1)

    def take_rows(self, rows: Tensor) -> PackedWeight:
        """A weight of some rows, in the given order; only where `has_own_rows`."""
        assert self.has_own_rows
        parts = {name: part if name in _SHARED_BY_ROWS else part[rows] for name, part in self.parts.items()}
        return PackedWeight(self.layout, (len(rows), *self.shape[1:]), parts, self.unpack, self.block)

    @property
    def dense(self) -> Tensor:
        """The tensor of a dense weight."""
        assert self.layout == "dense", self.layout
        return self.parts["weight"]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Expand to `shape`; float32 arithmetic, one rounding to `dtype` at the end."""
        expanded = self.unpack(self)
        return expanded if dtype is None else expanded.to(dtype)

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight on another device; itself if it is there already."""
        parts = {name: part.to(device) for name, part in self.parts.items()}
        if all(parts[name] is part for name, part in self.parts.items()):
            return self
        assert self.native is None, f"{self.layout} is for the CPU only"
        return PackedWeight(self.layout, self.shape, parts, self.unpack, self.block)


@dataclass(frozen=True)
class Activation:
    """How the gate and up projections of a gated MLP meet: `g × sigmoid(alpha × g) × (u + offset)`.

    With a `limit`, first g = min(gate, limit) and u = up within ±limit. The defaults make it SwiGLU (Shazeer 2020).
    """

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None


SWIGLU = Activation()


@dataclass(frozen=True, eq=False)
class Expert:
    """The three projections of one expert, each in its own layout, with optional biases of shape `[out]`."""

    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ExpertTable:
    """All experts of one layer. `cache` is where a kernel backend keeps what it derives from them once."""

    experts: Sequence[Expert]
    cache: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert_id: int) -> Expert:
        return self.experts[expert_id]


@dataclass(frozen=True)
class AttentionBatch:
    """Which rows of a step belong to which sequence, and where each sequence's keys and values lie.

    Attributes:
        query_starts: int64 `[sequences + 1]` on the CPU; rows `[query_starts[s], query_starts[s + 1])` are sequence s.
        context_lengths: int64 `[sequences]` on the CPU; tokens with keys and values, this step's included.
        block_tables: int64 `[sequences, blocks]` on the KV cache's device; rows padded with any valid block id.
        block_size: tokens in one block.
        cache: where a kernel backend keeps what it derives from the others once per step.
    """

    query_starts: Tensor
    context_lengths: Tensor
    block_tables: Tensor
    block_size: int
    cache: dict[str, object] = field(default_factory=dict, compare=False, repr=False)
