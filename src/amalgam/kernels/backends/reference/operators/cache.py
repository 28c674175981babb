"""Keys and values in the cache, as values or as codes."""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.kernels.step import LayerCache


def write_kv(cache: LayerCache, key: Tensor, value: Tensor, slot_ids: Tensor) -> None:
    """Store this step's keys and values in the cache's type: `cache[slot_ids[t]] = new[t]`."""
    _write(cache.keys, cache.key_scales, key, slot_ids)
    _write(cache.values, cache.value_scales, value, slot_ids)


def _write(cache: Tensor, scales: Tensor | None, rows: Tensor, slot_ids: Tensor) -> None:
    if not rows.numel():
        return
    if scales is None:
        cache.index_copy_(0, slot_ids, rows.to(cache.dtype))
        return
    codes, found = to_codes(rows, cache.dtype)
    cache.view(torch.uint8).index_copy_(0, slot_ids, codes.view(torch.uint8))
    scales.index_copy_(0, slot_ids, found)


def to_codes(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest codes of int8 or float8_e4m3fn for rows `[..., n]`, and the float32 scale `[...]` of each row.

    The scale is the largest magnitude divided by the largest code: 0 if there is none, NaN where a value is not finite.
    """
    wide = rows.float()
    largest = 127.0 if dtype is torch.int8 else 448.0
    scales = wide.abs().amax(-1) / largest
    is_finite = scales.isfinite()
    # A scale that is no normal number may be so inexact that a code would not fit.
    codes = (wide / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)).clamp(-largest, largest)
    codes = torch.where(is_finite.unsqueeze(-1), codes, 0.0)
    if dtype is torch.int8:
        codes = codes.round()
    return codes.to(dtype), torch.where(is_finite, scales, torch.nan)


def read(cache: Tensor, scales: Tensor | None, slots: Tensor) -> Tensor:
    """The values of some slots in float32."""
    if scales is None:
        return cache[slots].float()
    codes = cache.view(torch.uint8)[slots].view(cache.dtype).float()
    return codes * scales[slots].unsqueeze(-1)
