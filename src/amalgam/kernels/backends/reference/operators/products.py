"""Products of rows with weights, in tiles of a fixed number of rows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from amalgam.kernels.layouts import DENSE
from amalgam.kernels.weights import PackedWeight

# 8 rows: on a CPU a matrix product still runs near the memory's speed; a GPU needs more to be busy.
_TILE_ROWS = {"cpu": 8, "cuda": 64}


def embedding(token_ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding: `[tokens]` → `[tokens, hidden]` in `dtype`."""
    if weight.layout is not DENSE and weight.has_own_rows:
        return weight.take_rows(token_ids).dequantize(dtype)
    return functional.embedding(token_ids, weight.dequantize()).to(dtype)


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """`x Wᵀ + b`: `[rows, in]` → `[rows, out]` in `out_dtype`, x's type if None.

    Quantized weights are expanded to x's type; a floating weight of another type is not rounded to x's type: the
    product is then computed in the wider of the two.
    """
    expanded = weight.dequantize(None if weight.is_floating else x.dtype)
    compute = torch.promote_types(x.dtype, expanded.dtype)
    result = _tiled_product(x.to(compute), expanded.to(compute))
    if bias is not None:
        result = result + bias.to(compute)
    return result.to(x.dtype if out_dtype is None else out_dtype)


def per_head(x: Tensor, weight: Tensor) -> Tensor:
    """Every head times its own matrix: `[tokens, heads, in]` by `[heads, in, out]` → `[tokens, heads, out]`.

    In the wider of the two types, rounded to x's at the end.
    """
    compute = torch.promote_types(x.dtype, weight.dtype)
    tile, tokens = _TILE_ROWS[x.device.type], x.shape[0]
    padded = functional.pad(x.to(compute), (0, 0, 0, 0, 0, -tokens % tile)).transpose(0, 1)
    products = [torch.bmm(part.contiguous(), weight.to(compute)) for part in padded.split(tile, dim=1)]
    return torch.cat(products, dim=1).transpose(0, 1)[:tokens].to(x.dtype)


def _tiled_product(x: Tensor, weight: Tensor) -> Tensor:
    tile = _TILE_ROWS[x.device.type]
    rows = x.shape[0]
    padding = -rows % tile
    if padding:
        x = functional.pad(x, (0, 0, 0, padding))
    if x.shape[0] == tile:
        return functional.linear(x, weight)[:rows]
    return torch.cat([functional.linear(part, weight) for part in x.split(tile)])[:rows]
