"""Who runs a step's program: the compiled CPU kernels, Triton's on a GPU, or PyTorch on any device.

In: what a step works with. Out: a `Backend`. Must never know: families, checkpoints, requests.
"""

from __future__ import annotations

import importlib.util

import torch

from amalgam.kernels.backends.base import ActivationType, Backend, Compiled, Tables
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.backends.cpu.backend import CpuBackend
from amalgam.kernels.backends.cpu.operators import CpuOperators
from amalgam.kernels.backends.reference.interpreter import ReferenceBackend
from amalgam.kernels.backends.reference.operators import Operators

__all__ = [
    "ActivationType",
    "Backend",
    "Compiled",
    "Tables",
    "choose_backend",
    "operators_of",
    "why_no_triton",
    "why_not_compiled",
]


def choose_backend(dtype: torch.dtype, device: torch.device) -> Backend:
    """The fastest backend that there is, for activations and a KV cache of this type."""
    if why_not_compiled(device) is None:
        return CpuBackend(dtype)
    if why_no_triton(device) is None:
        from amalgam.kernels.backends.triton.backend import TritonBackend

        return TritonBackend(dtype, device)
    return ReferenceBackend(dtype, device)


def why_not_compiled(device: torch.device) -> str | None:
    """Why the compiled kernels do not run a model on a device; None if they do."""
    if device.type != "cpu":
        return f"it is for the CPU, and the model runs on {device}"
    return extension.why_unavailable()


def why_no_triton(device: torch.device) -> str | None:
    """Why Triton's kernels do not run a model on a device; None if they do."""
    if device.type != "cuda":
        return f"they are for GPUs, and the model runs on {device}"
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed: pip install "amalgam-llm[gpu]"'
    if (device.index or 0) >= torch.cuda.device_count():  # it is planned for
        return f"{device} is not in this machine"
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < (8, 0):
        return "they are for CUDA devices of compute capability 8.0 (A100) and above"
    from amalgam.kernels.backends.triton.launching import why_no_launch

    return why_no_launch()


def operators_of(device: torch.device) -> type[Operators]:
    """What multiplies on a device, one product at a time."""
    if device.type == "cpu":
        return CpuOperators
    if why_no_triton(device) is None:
        from amalgam.kernels.backends.triton.operators import TritonOperators

        return TritonOperators
    return Operators
