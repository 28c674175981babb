"""One function per operator; picks a backend and can report which it picked.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.
Semantics, shapes and types of every operator are those of `amalgam.kernels.reference`.
"""

from __future__ import annotations

from torch import Tensor

from amalgam.kernels import native, reference
from amalgam.kernels.packed import PackedWeight
from amalgam.kernels.reference import (
    embedding,
    layer_norm,
    linear,
    moe,
    paged_attention,
    per_head,
    rotate,
    sigmoid,
    swiglu,
    write_kv,
)

__all__ = [
    "backends",
    "embedding",
    "layer_norm",
    "linear",
    "moe",
    "paged_attention",
    "per_head",
    "prepare",
    "rms_norm",
    "rotate",
    "sigmoid",
    "swiglu",
    "write_kv",
]


def prepare(weight: PackedWeight) -> PackedWeight:
    """A linear weight in the layout that the fastest backend on its device reads; the same values."""
    return weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if native.supports_rms_norm(x, weight):
        return native.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def backends() -> dict[str, str]:
    """Operator → backend on the CPU: what `GET /model_info` and `amalgam bench` report."""
    compiled = f"native ({native.isa()})" if native.is_available() else "torch"
    return {name: compiled if name == "rms_norm" else "torch" for name in __all__ if name != "backends"}
