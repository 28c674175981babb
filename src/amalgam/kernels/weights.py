"""The weights that kernels read.

In: tensors in one of the runtime layouts (`amalgam.kernels.layouts` lists them). Out: nothing; these are nouns.
Must never know: checkpoint names, files, plans, layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Unpack = Callable[["PackedWeight"], Tensor]
Split = Callable[["PackedWeight"], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Layout:
    """How the values of a weight lie in memory. A name and a function are enough for a format's own.

    Attributes:
        name: for people and for packed caches.
        unpack: expands a weight to its shape in float32 (floating layouts: in their own type): the layout's meaning.
            None: weights of this layout expand themselves.
        parts, optional: names of the tensors that a weight has, and that it may have.
        shared: those of them that belong to all rows; the others have the rows first, where `has_rows`.
        has_rows: whether some rows can be expanded without the others.
        is_floating: whether the values are stored as they are, in a floating type of their own.
        dtype: of the values, where it is the same for all weights of a floating layout.
        panels: type of the part `weight` → the layout that the CPU backend makes of it where groups allow it.
        split: the parts that these panels are made of, by their names, where they are not the weight's own.
        reader: the one backend that knows it; None: all do, through `unpack`.
        base: the layout whose values this one multiplies by `columns`.
    """

    name: str
    unpack: Unpack | None
    parts: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()
    has_rows: bool = False
    is_floating: bool = False
    dtype: torch.dtype | None = None
    panels: Mapping[torch.dtype, Layout] = field(default_factory=dict)
    split: Split | None = None
    reader: str | None = None
    base: Layout | None = None


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """One weight in a runtime layout, immutable and shared between weight versions.

    Attributes:
        layout: the arrangement and its meaning; kernels dispatch on it.
        shape: logical shape, `(out, in)` for a linear weight.
        parts: the tensors, named as in the layout.
        block: `(rows, columns)` that share one scale; `(1, group_size)` for layouts with groups.
        is_mapped: its bytes are a file's pages, which the system can give up and read again.
    """

    layout: Layout
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    block: tuple[int, int] | None = None
    is_mapped: bool = False

    @property
    def is_floating(self) -> bool:
        """Whether the values are stored as they are, in a floating type of their own."""
        return self.layout.is_floating

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def runs(self) -> Sequence[Tensor]:
        """The tensors whose bytes are the weight, as a packed cache keeps them."""
        return tuple(self.parts.values())

    @property
    def has_own_rows(self) -> bool:
        """Whether every row has values and scales of its own, so that it can be expanded alone."""
        return self.layout.has_rows and (self.block is None or self.block[0] == 1)

    def take_rows(self, rows: Tensor) -> PackedWeight:
        """A weight of some rows, in the given order; only where `has_own_rows`."""
        assert self.has_own_rows
        parts = {name: part if name in self.layout.shared else part[rows] for name, part in self.parts.items()}
        return PackedWeight(self.layout, (len(rows), *self.shape[1:]), parts, self.block)

    @property
    def dense(self) -> Tensor:
        """The tensor of a dense weight."""
        assert self.layout.name == "dense", self.layout.name
        return self.parts["weight"]

    def unpack(self) -> Tensor:
        """The values in the logical shape, in float32; of floating layouts in their own type."""
        assert self.layout.unpack is not None, self.layout.name
        return self.layout.unpack(self)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Expand to `shape`; float32 arithmetic, one rounding to `dtype` at the end."""
        expanded = self.unpack()
        return expanded if dtype is None else expanded.to(dtype)

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight on another device; itself if it is there already."""
        parts = {name: part.to(device) for name, part in self.parts.items()}
        if all(parts[name] is part for name, part in self.parts.items()):
            return self
        assert self.layout.reader is None, f"{self.layout.name} is for one backend only"
        return PackedWeight(self.layout, self.shape, parts, self.block)


@dataclass(frozen=True)
class GatedActivation:
    """How the gate and up projections of a gated MLP meet: `g × sigmoid(alpha × g) × (u + offset)`.

    With a `limit`, first g = min(gate, limit) and u = up within ±limit. The defaults make it SwiGLU (Shazeer 2020).
    `limits_last`: the limit is of the first factor instead of g (Ling 3).
    `is_gelu`: the first factor is gelu(g) instead, in the tanh approximation (Hendrycks & Gimpel 2016).
    """

    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None
    is_gelu: bool = False
    limits_last: bool = False


SWIGLU, GEGLU = GatedActivation(), GatedActivation(is_gelu=True)


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
    """All experts of one layer.

    Attributes:
        devices: name of the device that each lies on, None with the rest of the model; empty: all do.
    """

    experts: Sequence[Expert]
    devices: tuple[str | None, ...] = ()

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert_id: int) -> Expert:
        return self.experts[expert_id]
