"""Norms and activations: one program for a row, or for a stretch of one.

In: activations. Out: new ones, with the meaning that `reference.operators` gives; a row's bits do not depend on the
other rows. Must never know: weights' layouts, plans, requests.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from amalgam.kernels.backends.triton.launching import FLOAT_TYPES, on_device_of, power_of_two, rounded, runs_on
from amalgam.kernels.backends.triton.numbers import OPTIONS
from amalgam.kernels.backends.triton.variants import Variant
from amalgam.kernels.weights import GatedActivation

_WIDEST = 16384  # of a row that one program keeps in registers
_STRETCH = 1024


def supports_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether the norms take these tensors; depends on types, devices and the last dimension only."""
    return (
        runs_on(x, weight)
        and x.dtype in FLOAT_TYPES
        and weight.dtype in FLOAT_TYPES
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and 0 < len(weight) <= _WIDEST
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.operators.rms_norm`."""
    return _norm(x, None, weight, None, eps)[1]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.operators.add_rms_norm`; x and delta of one shape and type."""
    return _norm(x, delta, weight, None, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `reference.operators.layer_norm`."""
    return _norm(x, None, weight, bias.contiguous(), eps)[1]


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    width = len(weight)
    rows, others = _rows(x), None if delta is None else _rows(delta)
    total = x if others is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        block = power_of_two(width)
        with on_device_of(x):
            norm_rows[(len(rows),)](
                rows,
                others,
                weight,
                bias,
                total,
                out,
                rows.stride(0),
                0 if others is None else others.stride(0),
                eps,
                WIDTH=width,
                BLOCK=block,
                num_warps=min(16, max(1, block // 512)),
                **OPTIONS,
            )
    return total, out


def _rows(x: Tensor) -> Tensor:
    """`[rows, width]` with the elements of a row side by side, as a view where one is."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def norm_rows(
    x, delta, weight, bias, total, out, x_stride, delta_stride, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """RMSNorm of one row, with a delta after x + delta; with a bias LayerNorm."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_there = column < WIDTH
    kind = out.dtype.element_ty
    wide = tl.load(x + row * x_stride + column, is_there, 0.0).to(tl.float32)
    if delta is not None:
        wide += tl.load(delta + row * delta_stride + column, is_there, 0.0).to(tl.float32)
        summed = rounded(wide, kind)
        tl.store(total + row * WIDTH + column, summed, is_there)
        wide = summed.to(tl.float32)
    factors = tl.load(weight + column, is_there, 0.0).to(tl.float32)
    if bias is not None:
        centred = tl.where(is_there, wide - tl.sum(wide, 0) / WIDTH, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
        result = normed * factors + tl.load(bias + column, is_there, 0.0).to(tl.float32)
    else:
        normed = rounded(wide * tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps), kind).to(tl.float32)
        result = normed * rounded(factors, kind).to(tl.float32)
    tl.store(out + row * WIDTH + column, rounded(result, kind), is_there)


def supports_gated(gate: Tensor, up: Tensor) -> bool:
    """Whether `gated` takes these tensors."""
    return runs_on(gate, up) and gate.dtype is up.dtype and gate.dtype in FLOAT_TYPES and gate.shape == up.shape


def gated(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    """See `reference.operators.gated`."""
    gates, ups = _rows(gate), _rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        # Plain ones round the activated gate before the product.
        is_plain = (activation.alpha, activation.offset, activation.limit) == (1.0, 0.0, None)
        with on_device_of(gate):
            gate_rows[(len(gates), triton.cdiv(gates.shape[1], _STRETCH))](
                gates,
                ups,
                out,
                gates.stride(0),
                ups.stride(0),
                gates.shape[1],
                activation.alpha,
                activation.offset,
                math.inf if activation.limit is None else activation.limit,
                BLOCK=min(_STRETCH, power_of_two(gates.shape[1])),
                IS_PLAIN=is_plain,
                IS_GELU=activation.is_gelu,
                LIMITS_LAST=activation.limits_last,
                **OPTIONS,
            )
    return out


def supports_gelu(x: Tensor) -> bool:
    """Whether `gelu` takes this tensor."""
    return runs_on(x) and x.dtype is torch.float32


def gelu(x: Tensor) -> Tensor:
    """See `reference.operators.gelu`."""
    rows = _rows(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        with on_device_of(x):
            gelu_rows[(len(rows), triton.cdiv(rows.shape[1], _STRETCH))](
                rows,
                out,
                rows.stride(0),
                rows.shape[1],
                BLOCK=min(_STRETCH, power_of_two(rows.shape[1])),
                **OPTIONS,
            )
    return out


@triton.jit
def gelu_of(x):
    """The tanh approximation: (1 + tanh(a)) / 2 = sigmoid(2 a)."""
    return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))


@triton.jit
def gate_rows(
    gate,
    up,
    out,
    gate_stride,
    up_stride,
    width,
    alpha,
    offset,
    limit,
    BLOCK: tl.constexpr,
    IS_PLAIN: tl.constexpr,
    IS_GELU: tl.constexpr,
    LIMITS_LAST: tl.constexpr,
):
    """A stretch of one row; see `GatedActivation`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = column < width
    kind = out.dtype.element_ty
    wide = tl.load(gate + row * gate_stride + column, is_there, 0.0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, is_there, 0.0).to(tl.float32)
    if not IS_PLAIN:
        if not LIMITS_LAST:
            wide = tl.where(wide > limit, limit, wide)
        factor = tl.where(factor > limit, limit, tl.where(factor < -limit, -limit, factor))
    if IS_GELU:
        first = gelu_of(wide)
    else:
        first = wide / (1.0 + tl.exp(-alpha * wide))
    if IS_PLAIN:
        result = rounded(first, kind).to(tl.float32) * factor
    else:
        if LIMITS_LAST:
            first = tl.where(first > limit, limit, first)
        result = first * (factor + offset)
    tl.store(out + row * width + column, rounded(result, kind), is_there)


@triton.jit
def gelu_rows(x, out, stride, width, BLOCK: tl.constexpr):
    """A stretch of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + row * stride + column, column < width, 0.0)
    tl.store(out + row * width + column, gelu_of(wide), column < width)


VARIANTS = (
    Variant(
        "norm/2048",
        norm_rows,
        {
            **dict.fromkeys(("x", "delta", "weight", "total", "out"), "*bf16"),
            **dict.fromkeys(("x_stride", "delta_stride"), "i32"),
            "eps": "fp32",
        },
        {"bias": None, "WIDTH": 2048, "BLOCK": 2048},
    ),
    Variant(
        "gate/768",
        gate_rows,
        {
            **dict.fromkeys(("gate", "up", "out"), "*bf16"),
            **dict.fromkeys(("gate_stride", "up_stride", "width"), "i32"),
            **dict.fromkeys(("alpha", "offset", "limit"), "fp32"),
        },
        {"BLOCK": 1024, "IS_PLAIN": True, "IS_GELU": False, "LIMITS_LAST": False},
    ),
    Variant(
        "gelu",
        gelu_rows,
        {"x": "*fp32", "out": "*fp32", "stride": "i32", "width": "i32"},
        {"BLOCK": 1024},
    ),
)
