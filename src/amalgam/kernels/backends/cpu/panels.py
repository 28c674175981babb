"""Linear weights in the compiled kernels' own layouts.

In: packed weights in the layouts of `amalgam.kernels.layouts`. Out: the same weights in panels.
Must never know: names, plans, requests.

Packing loses nothing: values, scales and zero points keep their bits and types, and `unpack` gives what the source
gave. What does not fit stays as it is and runs through the reference:

- scales must belong to one row and a group of inputs whose size is a multiple of 8, to all inputs of a row, or to a
  block whose width is such a multiple;
- with an activation order, every group must hold the same number of inputs;
- fp8 must hold no NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.kernels.backends.base import ActivationType
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.layouts import LAYOUTS
from amalgam.kernels.packed import Layout, PackedWeight

if TYPE_CHECKING:
    from amalgam import _native

_UNIT = 8  # a group is a multiple of this many inputs
_PREFIX = "panels_"


@dataclass(frozen=True, eq=False)
class PanelWeight(PackedWeight):
    """A weight in panels. Its parts are slices of one memory.

    Attributes:
        matrix: what the extension knows it by.
    """

    matrix: _native.Matrix = field(kw_only=True)

    @property
    def runs(self) -> Sequence[Tensor]:
        """The panels' memory, and the `group` where there is one."""
        return (self.matrix.memory, *(part for name, part in self.parts.items() if name == "group"))

    def unpack(self) -> Tensor:
        out = torch.empty(self.shape, dtype=torch.float32)
        extension.kernels().unpack(self.matrix, out, torch.get_num_threads())
        return out if self.layout.dtype is None else out.to(self.layout.dtype)


@dataclass(frozen=True)
class Panels:
    """What a weight in panels is, without its bytes.

    Attributes:
        block: see `PackedWeight`.
        scale_dtype, num_groups, scale_lanes: of the scales; 0 groups where there are none.
    """

    layout: Layout
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    scale_dtype: torch.dtype
    num_groups: int
    scale_lanes: int
    has_zero: bool


def prepare(weight: PackedWeight, activation: ActivationType = "int8", *, codes: bool = True) -> PackedWeight:
    """The weight in panels; itself where that is not possible.

    Args:
        activation: what bfloat16 activations become for integer weights.
        codes: whether bf16 is stored in 12 bits a value, without loss, where its exponents allow it. That takes a
            quarter off what a product reads; products in float32 become slower.
    """
    target = _target(weight)
    packed = _pack(weight, target, activation, codes) if target is not None and _fits(weight) else None
    if packed is None:
        return weight
    scale = weight.parts.get("scale")
    panels = Panels(
        layout=LAYOUTS[_PREFIX + packed.format.name],
        shape=weight.shape,
        block=weight.block,
        scale_dtype=torch.float32 if scale is None else scale.dtype,
        num_groups=0 if scale is None else scale.shape[1],
        scale_lanes=packed.scale_lanes,
        has_zero="zero" in weight.parts,
    )
    return _with_parts(packed, packed.memory, panels, weight.parts.get("group"))


def coded_bytes(shape: tuple[int, ...]) -> int:
    """About what a weight `[out, in]` takes that can be coded, as trained ones can; others keep 16 bits a value."""
    from amalgam import _native

    return min(_native.most_coded_bytes(*shape), 2 * math.prod(shape))


def view(memory: Tensor, panels: Panels, group: Tensor | None, activation: ActivationType) -> PackedWeight:
    """A weight whose panels lie in memory already, as `runs` gave them; shares the memory and never writes.

    Args:
        memory: uint8 `[bytes]` from a 64-byte boundary on.
        group: int32 `[in]`, the group of each input; None where they lie in order.
        activation: see `prepare`.

    Raises:
        ValueError: such panels do not exist, or take another number of bytes.
    """
    from amalgam import _native

    name = panels.layout.name
    if len(panels.shape) != 2:
        raise ValueError(f"there is no {name} of shape {panels.shape}")
    if panels.scale_dtype not in extension.NAMES or (panels.num_groups and panels.block is None):
        raise ValueError(f"{name} with scales of {panels.scale_dtype} in blocks of {panels.block}")
    packed = _native.view(
        format=_native.Format[name.removeprefix(_PREFIX)],
        rows=panels.shape[0],
        columns=panels.shape[1],
        memory=memory,
        scale_dtype=extension.native_dtype(panels.scale_dtype),
        num_groups=panels.num_groups,
        group=0 if panels.block is None else panels.block[1],
        scale_lanes=panels.scale_lanes,
        has_zero=panels.has_zero,
        order=None if group is None else _order(group),
        quantizes=activation == "int8",
    )
    return _with_parts(packed, memory, panels, group)


def layout_version() -> int:
    """Changes whenever the same panels become other bytes."""
    extension.kernels()
    from amalgam import _native

    return _native.layout_version


def _with_parts(packed: _native.Matrix, memory: Tensor, panels: Panels, group: Tensor | None) -> PanelWeight:
    """A matrix of the extension as a packed weight: its parts are slices of its memory."""
    parts = {"weight": memory[: packed.scale_offset]}
    if panels.num_groups:
        grid = (-(-panels.shape[0] // 16), panels.num_groups)
        end = packed.scale_offset + math.prod(grid) * panels.scale_lanes * panels.scale_dtype.itemsize
        scale = memory[packed.scale_offset : end].view(panels.scale_dtype)
        parts["scale"] = scale.view(*grid, panels.scale_lanes)
        if panels.has_zero:
            parts["zero"] = memory[packed.zero_offset :].view(*grid, 16)
    elif packed.scale_offset < memory.numel():
        parts["exceptions"] = memory[packed.scale_offset :]
    if group is not None:
        parts["group"] = group
    return PanelWeight(panels.layout, panels.shape, parts, panels.block, matrix=packed)


def _target(weight: PackedWeight) -> Layout | None:
    """The panels of a weight's layout; None for layouts that have none."""
    values = weight.parts.get("weight")
    return None if values is None else weight.layout.panels.get(values.dtype)


def _fits(weight: PackedWeight) -> bool:
    if not extension.is_available() or len(weight.shape) != 2 or not all(weight.shape):
        return False
    if any(part.device.type != "cpu" for part in weight.parts.values()):
        return False
    scale, group = weight.parts.get("scale"), weight.parts.get("group")
    if scale is None:
        return True
    assert weight.block is not None
    if scale.shape[1] > 1 and weight.block[1] % _UNIT:
        return False
    return group is None or bool((torch.bincount(group.long(), minlength=scale.shape[1]) == weight.block[1]).all())


def _pack(weight: PackedWeight, target: Layout, activation: ActivationType, codes: bool) -> _native.Matrix | None:
    from amalgam import _native

    parts = {name: part.contiguous() for name, part in weight.parts.items()}
    group, (rows, columns) = parts.get("group"), weight.shape
    return _native.pack(
        format=_native.Format[target.name.removeprefix(_PREFIX)],
        columns=columns,
        weight=parts["weight"],
        scale=parts.get("scale"),
        block=weight.block or (rows, columns),
        zero=parts.get("zero"),
        order=None if group is None else _order(group),
        quantizes=activation == "int8",
        codes=codes,
    )


def _order(group: Tensor) -> Tensor:
    """Inputs of a group side by side, in the order they have."""
    return torch.argsort(group.long(), stable=True).to(torch.int32)
