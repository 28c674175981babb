"""Norms, rotation, activations and what else is done with every element of a row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.kernels.weights import GEGLU, SWIGLU, GatedActivation


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), as Llama computes it.

    float32 inside, rounded to x's type before the multiplication with the weight.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + delta`, and that after `rms_norm`."""
    total = x + delta
    return total, rms_norm(total, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension (Ba et al. 2016), in float32."""
    return functional.layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) on the first r dimensions of each head, halves paired with each other.

    x: `[tokens, heads, head_dim]`; cos, sin: float32 `[tokens, r / 2]`.
    """
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return rotated if 2 * half == x.shape[-1] else torch.cat((rotated, x[..., 2 * half :]), dim=-1)


def part_pairs(x: Tensor, width: int) -> Tensor:
    """The first `width` dimensions, rotary pairs of neighbours, as halves.

    Queries and keys are reordered alike, which no score notices.
    """
    return torch.cat((x[..., 0:width:2], x[..., 1:width:2], x[..., width:]), dim=-1)


def sigmoid(x: Tensor) -> Tensor:
    """Logistic function in float32, the same bits for a value wherever it stands in a tensor."""
    return 1.0 / (1.0 + torch.exp(-x.float()))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) × up` (Shazeer 2020), silu in float32."""
    wide = gate.float()
    return (wide / (1.0 + torch.exp(-wide))).to(gate.dtype) * up


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh approximation (Hendrycks & Gimpel 2016), of float32."""
    # (1 + tanh(a)) / 2 = sigmoid(2 a)
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def gated(gate: Tensor, up: Tensor, activation: GatedActivation) -> Tensor:
    """Gate and up projection joined as `GatedActivation` says, float32; plain SwiGLU and GEGLU as `swiglu` does it."""
    if activation == SWIGLU:
        return swiglu(gate, up)
    if activation == GEGLU:
        return gelu(gate.float()).to(gate.dtype) * up
    wide, factor = gate.float(), up.float()
    if activation.limit is not None:
        wide = wide if activation.limits_last else wide.clamp(max=activation.limit)
        factor = factor.clamp(-activation.limit, activation.limit)
    first = gelu(wide) if activation.is_gelu else wide / (1.0 + torch.exp(-activation.alpha * wide))
    if activation.limits_last:
        first = first.clamp(max=activation.limit)
    return (first * (factor + activation.offset)).to(gate.dtype)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """`cap × tanh(x / cap)`, of float32, the same bits for a value wherever it stands in a tensor."""
    return cap - 2.0 * cap / (1.0 + torch.exp(x * (2.0 / cap)))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) of float32; for x > 20 it is x."""
    return torch.where(x > 20.0, x, torch.log1p(torch.exp(x)))


def changed_logits(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Logits as `Head` changes them."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else soft_cap(logits, softcap)
