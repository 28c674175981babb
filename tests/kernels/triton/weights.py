"""Weights as the kernels of a GPU get them, and what their products may differ by."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels.backends.triton.kinds import TritonWeight
from amalgam.kernels.layouts import E2M1, TABLE4
from amalgam.kernels.weights import PackedWeight

# The parts of a rounding: of values to bfloat16 and float16, and what sums in float32 leave of some hundred products.
HALF_STEP = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-24}
SUMS = 2**-18


def ready(weight: PackedWeight) -> TritonWeight:
    read = TritonWeight.of(weight)
    assert isinstance(read, TritonWeight), weight.layout.name
    return read


def mxfp4(shape: tuple[int, int], seed: int = 0) -> PackedWeight:
    """Any nibbles; scales from 2^-10 to 2^-3."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.randint(117, 125, (shape[0], shape[1] // 32), dtype=torch.uint8, generator=generator)
    parts = {
        "weight": torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, generator=generator),
        "scale": scale.view(torch.float8_e8m0fnu),
        "table": torch.tensor(E2M1),
    }
    return PackedWeight(TABLE4, shape, parts, (1, 32))


def exact(x: Tensor, weight: PackedWeight) -> tuple[Tensor, Tensor]:
    """The product in float64, and the same of all magnitudes."""
    values = weight.dequantize(torch.float64)
    return x.double() @ values.T, x.double().abs() @ values.abs().T


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
