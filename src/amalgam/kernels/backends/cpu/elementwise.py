"""Compiled norms, rotation and activation, on torch tensors.

In: CPU tensors. Out: new CPU tensors with the meaning that `amalgam.kernels.backends.reference` gives; a row's bits do
not depend on the other rows. Must never know: weights' layouts, plans, requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels.backends.cpu import extension


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
    if not supports_rms_norm(x, weight):
        raise ValueError(_unfit_for_norm(x, weight))
    x = x.contiguous()
    out = torch.empty_like(x)
    _rms_norm(x, 0, 0, weight, out, eps)
    return out


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta`, and that after `rms_norm`; x and delta of one shape and type.

    Raises:
        UnsupportedError, ValueError: as `rms_norm`.
    """
    if not supports_rms_norm(x, weight) or delta.shape != x.shape or delta.dtype != x.dtype or not delta.is_cpu:
        raise ValueError(f"{_unfit_for_norm(x, weight)}, after adding {delta.dtype} {tuple(delta.shape)}")
    x, delta = x.contiguous(), delta.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    _rms_norm(x, delta.data_ptr(), total.data_ptr(), weight, out, eps)
    return total, out


def _unfit_for_norm(x: Tensor, weight: Tensor) -> str:
    return (
        f"rms_norm of {x.dtype} {tuple(x.shape)} on {x.device} with a weight of {weight.dtype} "
        f"{tuple(weight.shape)} on {weight.device}; expected float32 or bfloat16 [..., hidden] and [hidden] on cpu"
    )


def _rms_norm(x: Tensor, delta: int, total: int, weight: Tensor, out: Tensor, eps: float) -> None:
    weight = weight.contiguous()
    hidden = weight.numel()
    if out.numel():
        extension.kernels().rms_norm(
            x.data_ptr(),
            delta,
            total,
            weight.data_ptr(),
            out.data_ptr(),
            x.numel() // hidden,
            hidden,
            eps,
            extension.native_dtype(x.dtype),
            extension.native_dtype(weight.dtype),
            torch.get_num_threads(),
        )


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
    """Rotary embedding; see `reference.rotate`."""
    if not supports_rotate(x, cos, sin):
        raise ValueError(f"rotate of {x.dtype} {tuple(x.shape)} by {cos.dtype} {tuple(cos.shape)} on {x.device}")
    tokens, heads, head_dim = x.shape
    if x.stride()[1:] != (head_dim, 1):
        x = x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype)
    if out.numel():
        extension.kernels().rotate(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            tokens,
            x.stride(0),
            heads,
            head_dim,
            cos.shape[1],
            extension.native_dtype(x.dtype),
            torch.get_num_threads(),
        )
    return out


def supports_swiglu(gate: Tensor, up: Tensor) -> bool:
    """Whether `swiglu` takes these tensors."""
    return (
        extension.is_available()
        and gate.dtype == up.dtype
        and gate.dtype in extension.FLOAT_TYPES
        and gate.device.type == up.device.type == "cpu"
        and gate.shape == up.shape
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) × up`; see `reference.swiglu`."""
    if not supports_swiglu(gate, up):
        raise ValueError(f"swiglu of {gate.dtype} {tuple(gate.shape)} and {up.dtype} {tuple(up.shape)}")
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        extension.kernels().swiglu(
            gate=gate.data_ptr(),
            up=up.data_ptr(),
            out=out.data_ptr(),
            elements=out.numel(),
            dtype=extension.native_dtype(out.dtype),
            threads=torch.get_num_threads(),
        )
    return out
