"""Packed weights over bytes that a file holds.

In: a packed weight; later a description and the bytes again, which nobody vouches for. Out: its description and its
bytes; later the same weight, sharing that memory. Must never know: files, names, plans.

A weight's bytes are a few *runs*, each from a 64-byte boundary on: the native memory of a weight in panels, then its
`group`; otherwise its parts in the order of the description.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from amalgam.kernels.backends.base import ActivationType
from amalgam.kernels.backends.cpu import panels
from amalgam.kernels.backends.cpu.panels import Panels
from amalgam.kernels.layouts import DENSE, LAYOUTS, is_known
from amalgam.kernels.weights import PackedWeight

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "int8": torch.int8,
    "int16": torch.int16,
    "uint8": torch.uint8,
    "int32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def can_be_mapped(weight: PackedWeight) -> bool:
    """Whether `describe` and `restore` know this weight's layout."""
    return is_known(weight.layout) and all(part.is_cpu and part.dtype in _NAMES for part in weight.parts.values())


def describe(weight: PackedWeight) -> dict[str, Any]:
    """What `restore` needs besides the bytes, as JSON."""
    return {
        "layout": weight.layout.name,
        "shape": list(weight.shape),
        "block": None if weight.block is None else list(weight.block),
        "parts": {name: [_NAMES[part.dtype], list(part.shape)] for name, part in weight.parts.items()},
    }


def runs(weight: PackedWeight) -> list[Tensor]:
    """The weight's bytes: uint8 `[bytes]` each."""
    return [tensor.contiguous().view(-1).view(torch.uint8) for tensor in weight.runs]


def restore(description: Mapping[str, Any], memory: Sequence[Tensor], activation: ActivationType) -> PackedWeight:
    """The weight that `describe` described; reads none of the bytes but `group`.

    Args:
        memory: its runs, each from a 64-byte boundary on.
        activation: see `panels.prepare`; panels hold the same bytes for all.

    Raises:
        ValueError: no such weight has runs of these sizes.
    """
    try:
        layout, shape = LAYOUTS[description["layout"]], tuple(description["shape"])
        block = None if description["block"] is None else tuple(description["block"])
        parts = {name: (_DTYPES[dtype], tuple(sizes)) for name, (dtype, sizes) in description["parts"].items()}
        all_sizes = [*shape, *(block or ()), *(size for _, sizes in parts.values() for size in sizes)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a weight is described as {description} ({error})") from error
    if (
        not layout.parts <= parts.keys() <= layout.parts | layout.optional
        or not all(type(size) is int and 0 <= size < 2**48 for size in all_sizes)
        or (block and len(block) != 2)
    ):
        raise ValueError(f"a weight has layout {layout.name!r}, the sizes {shape}, {block}, {parts}")
    if layout.reader is not None:
        scale_dtype, scale_shape = parts.get("scale", (torch.float32, (0, 0, 1)))
        group = _typed(memory[1], *parts["group"]) if "group" in parts and len(memory) == 2 else None
        if len(memory) != 1 + ("group" in parts) or len(scale_shape) != 3:
            raise ValueError(f"panels have {len(memory)} runs and scales of shape {scale_shape}")
        zero_dtype = parts["zero"][0] if "zero" in parts else None
        offset = "minimum" if "minimum" in parts else "zero" if zero_dtype not in (None, torch.uint8) else "none"
        has_zero = zero_dtype == torch.uint8
        book_dtype, books = parts.get("codebooks", (torch.float32, (0, 0, 0)))
        if len(books) != 3:
            raise ValueError(f"panels have codebooks of shape {books}")
        scales = scale_dtype, scale_shape[1], scale_shape[2]
        kind = Panels(layout, shape, block, *scales, has_zero, offset, books, book_dtype)
        return panels.view(memory[0], kind, group, activation)
    if len(memory) != len(parts):
        raise ValueError(f"layout {layout.name!r} has {len(memory)} runs")
    tensors = {name: _typed(run, *parts[name]) for name, run in zip(parts, memory, strict=True)}
    if layout is DENSE and tensors["weight"].shape != shape:
        raise ValueError(f"a dense weight of shape {shape} has {parts}")
    return PackedWeight(layout, shape, tensors, block)


def _typed(run: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if math.prod(shape) * dtype.itemsize != run.numel():
        raise ValueError(f"{run.numel()} bytes are no {dtype} of shape {shape}")
    return run.view(dtype).view(shape)
