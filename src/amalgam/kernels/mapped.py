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

from amalgam.kernels import layouts, panels, reference
from amalgam.kernels.packed import PackedWeight, Unpack
from amalgam.kernels.panels import ActivationType, Panels

RUN_ALIGNMENT = 64
_PANELS = "panels_"
_COLUMNS = "_columns"
# Other layouts are loaded from their source: what expands them is known to their format alone.
_UNPACK: Mapping[str, Unpack] = {
    "dense": reference.unpack_dense,
    "scaled8": reference.unpack_scaled8,
    "int4": reference.unpack_int4,
    "affine4": layouts.unpack_affine4,
    "affine8": layouts.unpack_affine8,
    "cyclic4": layouts.unpack_cyclic4,
    "cyclic8": layouts.unpack_cyclic8,
    "table4": layouts.unpack_table4,
}
LAYOUTS = frozenset(_UNPACK)
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def can_be_mapped(weight: PackedWeight) -> bool:
    """Whether `describe` and `restore` know this weight's layout."""
    return (weight.native is not None or _unpack(weight.layout) is not None) and all(
        part.is_cpu and part.dtype in _NAMES for part in weight.parts.values()
    )


def describe(weight: PackedWeight) -> dict[str, Any]:
    """What `restore` needs besides the bytes, as JSON."""
    return {
        "layout": weight.layout,
        "shape": list(weight.shape),
        "block": None if weight.block is None else list(weight.block),
        "parts": {name: [_NAMES[part.dtype], list(part.shape)] for name, part in weight.parts.items()},
    }


def runs(weight: PackedWeight) -> list[Tensor]:
    """The weight's bytes: uint8 `[bytes]` each."""
    tensors = list(weight.parts.values())
    if weight.native is not None:
        tensors = [panels.native_memory(weight), *(weight.parts[name] for name in weight.parts if name == "group")]
    return [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]


def restore(description: Mapping[str, Any], memory: Sequence[Tensor], activation: ActivationType) -> PackedWeight:
    """The weight that `describe` described; reads none of the bytes but `group`.

    Args:
        memory: its runs, each from a 64-byte boundary on.
        activation: see `panels.prepare`; panels hold the same bytes for all.

    Raises:
        ValueError: no such weight has runs of these sizes.
    """
    try:
        layout, shape = description["layout"], tuple(description["shape"])
        block = None if description["block"] is None else tuple(description["block"])
        parts = {name: (_DTYPES[dtype], tuple(sizes)) for name, (dtype, sizes) in description["parts"].items()}
        all_sizes = [*shape, *(block or ()), *(size for _, sizes in parts.values() for size in sizes)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"a weight is described as {description} ({error})") from error
    if (
        not isinstance(layout, str)
        or not all(type(size) is int and 0 <= size < 2**48 for size in all_sizes)
        or (block and len(block) != 2)
    ):
        raise ValueError(f"a weight has the sizes {shape}, {block}, {parts}")
    if layout.startswith(_PANELS):
        name = layout.removeprefix(_PANELS)
        scale_dtype, scale_shape = parts.get("scale", (torch.float32, (0, 0, 1)))
        group = _typed(memory[1], *parts["group"]) if "group" in parts and len(memory) == 2 else None
        if len(memory) != 1 + ("group" in parts) or len(scale_shape) != 3:
            raise ValueError(f"panels have {len(memory)} runs and scales of shape {scale_shape}")
        kind = Panels(name, shape, block, scale_dtype, scale_shape[1], scale_shape[2], "zero" in parts)
        return panels.view(memory[0], kind, group, activation)
    unpack = _unpack(layout)
    if unpack is None or len(memory) != len(parts):
        raise ValueError(f"layout {layout!r} has {len(memory)} runs")
    tensors = {name: _typed(run, *parts[name]) for name, run in zip(parts, memory, strict=True)}
    if layout == "dense" and (set(tensors) != {"weight"} or tensors["weight"].shape != shape):
        raise ValueError(f"a dense weight of shape {shape} has {parts}")
    return PackedWeight(layout, shape, tensors, unpack, block)


def _unpack(layout: str) -> Unpack | None:
    """What expands a layout that is not in panels."""
    inner = _UNPACK.get(layout.removesuffix(_COLUMNS))
    return layouts.ScaledColumns(inner) if inner is not None and layout.endswith(_COLUMNS) else inner


def _typed(run: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if math.prod(shape) * dtype.itemsize != run.numel():
        raise ValueError(f"{run.numel()} bytes are no {dtype} of shape {shape}")
    return run.view(dtype).view(shape)
