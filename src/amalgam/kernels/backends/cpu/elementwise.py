"""Compiled norms, rotation and activation, on torch tensors.

In: CPU tensors. Out: new CPU tensors with the meaning that `amalgam.kernels.backends.reference` gives; a row's bits do
not depend on the other rows. Must never know: weights' layouts, plans, requests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.weights import GatedActivation


def supports_rms_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` takes these tensors; depends on types, devices and the last dimension only."""
    return (
        extension.is_available()
        and x.dtype in extension.FLOAT_TYPES
        and weight.dtype in extension.FLOAT_TYPES
        and x.is_cpu
        and weight.is_cpu
        and x.dim() > 0
        and weight.shape == x.shape[-1:]
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), as Llama computes it.

    float32 inside, rounded to x's type before the multiplication with the weight in x's type.

    Args:
        x: float32 or bfloat16 `[..., hidden]`.
        weight: float32 or bfloat16 `[hidden]`.

    Raises:
        UnsupportedError: the extension is not available.
        ValueError: other types, devices or shapes.
    """
    x = x.contiguous()
    out = torch.empty_like(x)
    extension.kernels().rms_norm(x, None, None, weight.contiguous(), out, eps, torch.get_num_threads())
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta`, and that after `rms_norm`; x and delta of one shape and type.

    Raises:
        UnsupportedError, ValueError: as `rms_norm`.
    """
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    extension.kernels().rms_norm(x, delta, total, weight.contiguous(), out, eps, torch.get_num_threads())
    return total, out


def supports_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether `rotate` takes these tensors."""
    return (
        extension.is_available()
        and x.dtype in extension.FLOAT_TYPES
        and cos.dtype == sin.dtype == torch.float32
        and x.device.type == cos.device.type == sin.device.type == "cpu"
        and x.dim() == 3
        and cos.shape == sin.shape
        and cos.shape[0] == x.shape[0]
        and 2 * cos.shape[1] <= x.shape[2]
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; see `reference.rotate`.

    Raises:
        ValueError: types or shapes that do not fit together.
    """
    if x.stride()[1:] != (x.shape[-1], 1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    extension.kernels().rotate(x, cos.contiguous(), sin.contiguous(), out, torch.get_num_threads())
    return out


def supports_gated(gate: Tensor, up: Tensor) -> bool:
    """Whether `gated` takes these tensors."""
    return (
        extension.is_available()
        and gate.dtype == up.dtype
        and gate.dtype in extension.FLOAT_TYPES
        and gate.device.type == up.device.type == "cpu"
        and gate.shape == up.shape
    )


def gated(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    """Gate and up projection joined as `GatedActivation` says; see `reference.gated`.

    Raises:
        ValueError: types or shapes that do not fit together.
    """
    gate = gate.contiguous()
    out = torch.empty_like(gate)
    extension.kernels().swiglu(gate, up.contiguous(), out, *numbers_of(activation), torch.get_num_threads())
    return out


def numbers_of(activation: GatedActivation) -> tuple[float, float, float, bool, bool]:
    """An activation as the extension takes it."""
    limit = math.inf if activation.limit is None else activation.limit
    return activation.alpha, activation.offset, limit, activation.is_gelu, activation.limits_last
