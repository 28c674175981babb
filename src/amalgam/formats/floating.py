"""Unquantized weights: float32, bfloat16, float16, each kept in its own type."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from amalgam.formats.contract import (
    WEIGHT_SUFFIX,
    ModuleContext,
    Read,
    StoredWeight,
    WeightFormat,
)
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import DENSE, dense
from amalgam.kernels.weights import PackedWeight


class Floating(WeightFormat):
    """One floating type; biases, norms and embeddings of any rank as well as linear weights."""

    layouts = (DENSE,)
    is_wide = True

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self.dtype = dtype

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        entry = parts[WEIGHT_SUFFIX]
        return StoredWeight(name, self, entry.shape, parts) if entry.dtype == self.dtype else None

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return 1

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        # A view of the file: whoever packs it copies it, and `Source.load` does where nobody has.
        return dense(read(stored.parts[WEIGHT_SUFFIX]))

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        return math.prod(shape) * self.dtype.itemsize


FORMATS = (
    Floating("fp32", torch.float32),
    Floating("bf16", torch.bfloat16),
    Floating("fp16", torch.float16),
)
