"""One function per operator; picks a backend and can report which it picked.

In: activations and packed weights. Out: activations. Must never know: names, plans, requests.
Semantics, shapes and types of every operator are those of `amalgam.kernels.reference`.
"""

from __future__ import annotations

from torch import Tensor

from amalgam.kernels import attention, native, reference
from amalgam.kernels.packed import AttentionBatch, PackedWeight
from amalgam.kernels.reference import embedding, linear, moe, rotate, sigmoid, swiglu

__all__ = [
    "backends",
    "embedding",
    "linear",
    "moe",
    "paged_attention",
    "prepare",
    "rms_norm",
    "rotate",
    "sigmoid",
    "swiglu",
    "write_kv",
]

_COMPILED = frozenset({"paged_attention", "rms_norm", "write_kv"})


def prepare(weight: PackedWeight) -> PackedWeight:
    """A linear weight in the layout that the fastest backend on its device reads; the same values."""
    return weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if native.supports_rms_norm(x, weight):
        return native.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def write_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
    """See `reference.write_kv`."""
    if attention.supports_write_kv(keys, values, key, value, slot_ids):
        attention.write_kv(keys, values, key, value, slot_ids)
    else:
        reference.write_kv(keys, values, key, value, slot_ids)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """See `reference.paged_attention`."""
    if attention.supports_paged_attention(query, keys, values, batch):
        return attention.paged_attention(query, keys, values, batch, scale=scale, window=window, sinks=sinks)
    return reference.paged_attention(query, keys, values, batch, scale=scale, window=window, sinks=sinks)


def backends() -> dict[str, str]:
    """Operator → backend on the CPU: what `GET /model_info` and `amalgam bench` report."""
    compiled = f"native ({native.isa()})" if native.is_available() else "torch"
    return {name: compiled if name in _COMPILED else "torch" for name in __all__ if name != "backends"}
