"""Who runs a step's program: the compiled CPU kernels, or PyTorch on any device.

In: what a step works with. Out: a `Backend`. Must never know: families, checkpoints, requests.
"""

from __future__ import annotations

import torch

from amalgam.kernels import native
from amalgam.kernels.backends.base import Backend, Compiled, Tables
from amalgam.kernels.backends.cpu import CpuBackend
from amalgam.kernels.backends.interpreter import Interpreter

__all__ = ["Backend", "Compiled", "Tables", "choose_backend"]


def choose_backend(dtype: torch.dtype, device: torch.device, tables: Tables) -> Backend:
    """The fastest backend that there is.

    Args:
        dtype: of activations and of the KV cache.
        tables: cos and sin of all positions, float32 `[positions, r / 2]`, one pair for each rope of the programs.
    """
    if device.type == "cpu" and native.is_available() and dtype in native.FLOAT_TYPES:
        return CpuBackend(dtype, tables)
    return Interpreter(dtype, tables)
