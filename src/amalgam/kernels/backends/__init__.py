"""Who runs a step's program: the compiled CPU kernels, or PyTorch on any device.

In: what a step works with. Out: a `Backend`. Must never know: families, checkpoints, requests.
"""

from __future__ import annotations

import torch

from amalgam.kernels.backends.base import ActivationType, Backend, Compiled, Tables
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend

__all__ = ["ActivationType", "Backend", "Compiled", "Tables", "choose_backend", "why_not_compiled"]


def choose_backend(dtype: torch.dtype, device: torch.device) -> Backend:
    """The fastest backend that there is, for activations and a KV cache of this type."""
    return CpuBackend(dtype) if why_not_compiled(device) is None else ReferenceBackend(dtype, device)


def why_not_compiled(device: torch.device) -> str | None:
    """Why the compiled kernels do not run a model on a device; None if they do."""
    if device.type != "cpu":
        return f"it is for the CPU, and the model runs on {device}"
    return extension.why_unavailable()
