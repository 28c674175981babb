"""Linear weights in the compiled kernels' own layouts.

In: packed weights in the layouts of `amalgam.kernels.layouts`. Out: the same weights in panels.
Must never know: names, plans, requests.

Packing loses nothing: values, scales and zero points keep their bits and types, and `unpack` gives what the source
gave. What does not fit stays as it is and runs through the reference:

- with an activation order, every group must hold the same number of inputs;
- vectors of codebooks must lie along the inputs, a multiple of 8 of them;
- fp8 must hold no NaN.

Codes that need fewer bits than their layout has are packed in as few as they need, as 2 and 3 bits are published.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from amalgam.kernels.backends.base import ActivationType
from amalgam.kernels.backends.cpu import extension
from amalgam.kernels.layouts import (
    CODEBOOKS,
    LAYOUTS,
    PANELS_FLOAT_TABLE4,
    PANELS_INT1,
    PANELS_INT2,
    PANELS_INT3,
    PANELS_INT4,
    PANELS_INT5,
    PANELS_INT8,
    PANELS_TABLE4,
    unpack_nibbles,
)
from amalgam.kernels.weights import Layout, PackedWeight

if TYPE_CHECKING:
    from amalgam import _native

_PREFIX = "panels_"
_SAMPLE = 16  # rows that tell of most weights that they need all bits
# Bits → inputs that are packed together, and the panels.
_NARROW = {1: (32, PANELS_INT1), 2: (16, PANELS_INT2), 3: (32, PANELS_INT3), 5: (32, PANELS_INT5)}


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
        has_zero: whether groups have integer zero points.
        offset: what groups have of the scale's type beside it: none, zero or minimum.
        books, book_dtype: how many codebooks, their vectors, the inputs of a vector; 0 where there are none.
    """

    layout: Layout
    shape: tuple[int, ...]
    block: tuple[int, int] | None
    scale_dtype: torch.dtype
    num_groups: int
    scale_lanes: int
    has_zero: bool
    offset: str = "none"
    books: tuple[int, int, int] = (0, 0, 0)
    book_dtype: torch.dtype = torch.float32


def prepare(weight: PackedWeight, activation: ActivationType = "int8", *, codes: bool = True) -> PackedWeight:
    """The weight in panels; itself where that is not possible.

    Args:
        activation: what bfloat16 activations become for integer weights.
        codes: whether bf16 is stored in 12 bits a value, without loss, where its exponents allow it. That takes a
            quarter off what a product reads; products in float32 become slower.
    """
    target = _target(weight)
    if target is None or not _fits(weight):
        return weight
    parts = _split(weight)
    target, parts = _narrowest(target, parts, weight)
    if "group" in parts and "group" not in target.optional:
        return weight
    packed = _pack(weight, parts, target, activation, codes)
    if packed is None:
        return weight
    scale = parts.get("scale")
    books, book_dtype = _books_of(parts)
    panels = Panels(
        layout=LAYOUTS[_PREFIX + packed.format.name],
        shape=weight.shape,
        block=weight.block,
        scale_dtype=torch.float32 if scale is None else scale.dtype,
        num_groups=0 if scale is None else scale.shape[1],
        scale_lanes=packed.scale_lanes,
        has_zero="zero" in parts and parts["zero"].dtype == torch.uint8,
        offset=_offset(parts),
        books=books,
        book_dtype=book_dtype,
    )
    return _with_parts(packed, packed.memory, panels, parts.get("group"))


def coded_bytes(shape: tuple[int, ...]) -> int:
    """About what a weight `[out, in]` takes that can be coded, as trained ones can; others keep 16 bits a value."""
    from amalgam import _native

    return min(_native.most_coded_bytes(*shape), 2 * math.prod(shape))


def keeps_bits(shape: tuple[int, ...], bits: int, group_size: int) -> bool:
    """Whether there are panels of so many bits for integers in such groups."""
    return extension.is_available() and bits in _NARROW and _divides(_NARROW[bits][0], shape[1], group_size)


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
    if panels.scale_dtype not in extension.SCALE_NAMES or (panels.num_groups and panels.block is None):
        raise ValueError(f"{name} with scales of {panels.scale_dtype} in blocks of {panels.block}")
    if panels.book_dtype not in extension.NAMES:
        raise ValueError(f"{name} with codebooks of {panels.book_dtype}")
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
        offset_kind=_native.Offset[panels.offset],
        order=None if group is None else _order(group),
        quantizes=activation == "int8",
        books=panels.books,
        book_dtype=extension.native_dtype(panels.book_dtype),
    )
    return _with_parts(packed, memory, panels, group)


def layout_version() -> int:
    """Changes whenever the same panels become other bytes."""
    extension.kernels()
    from amalgam import _native

    return _native.layout_version


def _with_parts(packed: _native.Matrix, memory: Tensor, panels: Panels, group: Tensor | None) -> PanelWeight:
    """A matrix of the extension as a packed weight: its parts are slices of its memory."""
    scale_at, zero_at, offset_at, part_at, table_at, end = packed.begins
    parts = {"weight": memory[:scale_at]}
    if panels.num_groups:
        grid = (-(-panels.shape[0] // 16), panels.num_groups)

        def slice_of(at: int, dtype: torch.dtype, lanes: int) -> Tensor:
            return memory[at : at + math.prod(grid) * lanes * dtype.itemsize].view(dtype).view(*grid, lanes)

        parts["scale"] = slice_of(scale_at, panels.scale_dtype, panels.scale_lanes)
        if panels.has_zero:
            parts["zero"] = slice_of(zero_at, torch.uint8, 16)
        if panels.offset != "none":
            parts[panels.offset] = slice_of(offset_at, panels.scale_dtype, 16)
        if "part" in panels.layout.parts:
            parts["part"] = memory[part_at:table_at]
        if "table" in panels.layout.parts:
            parts["table"] = memory[table_at:end].view(torch.float32)
        if "codebooks" in panels.layout.parts:
            parts["codebooks"] = memory[table_at:end].view(panels.book_dtype).view(panels.books)
    elif scale_at < memory.numel():
        parts["exceptions"] = memory[scale_at:]
    if group is not None:
        parts["group"] = group
    return PanelWeight(panels.layout, panels.shape, parts, panels.block, matrix=packed)


def _split(weight: PackedWeight) -> Mapping[str, Tensor]:
    """What the panels are made of; a floating offset has the scale's type, in which it is exact."""
    parts = dict(weight.parts if weight.layout.split is None else weight.layout.split(weight))
    name = _offset(parts)
    if name != "none" and parts[name].dtype != parts["scale"].dtype:
        narrow = parts[name].to(parts["scale"].dtype)
        if torch.equal(narrow.to(parts[name].dtype), parts[name]):
            parts[name] = narrow
        else:
            parts |= {name: parts[name].float(), "scale": parts["scale"].float()}
    return parts


def _narrowest(
    target: Layout, parts: Mapping[str, Tensor], weight: PackedWeight
) -> tuple[Layout, Mapping[str, Tensor]]:
    """Panels of fewer bits where all codes fit them, with the parts that they are made of."""
    if target is PANELS_TABLE4:
        doubled = parts["table"][:16] * 2
        is_integer = bool(((doubled == doubled.round()) & (doubled.abs() <= 254)).all())
        fits = is_integer and bool((doubled.abs() <= 127).all() or (doubled % 2 == 0).all())
        return PANELS_TABLE4 if fits else PANELS_FLOAT_TABLE4, parts
    is_wide = target is PANELS_INT8 and _offset(parts) == "zero"
    if target is not PANELS_INT4 and not is_wide:
        return target, parts
    assert weight.block is not None
    unit = weight.shape[1] if parts["scale"].shape[1] == 1 else weight.block[1]
    widths = [(bits, to) for bits, (step, to) in _NARROW.items() if _divides(step, weight.shape[1], unit)]
    has_own_zero = "zero" in parts or "minimum" in parts

    def codes_of(rows: Tensor) -> Tensor:
        return rows.view(torch.uint8) ^ 128 if is_wide else unpack_nibbles(rows)

    def fitting(codes: Tensor) -> tuple[Layout, int] | None:
        low, high = (int(value) for value in codes.aminmax())
        for bits, to in widths:
            least = 0 if has_own_zero else 8 - (1 << bits - 1)  # the middle stays the middle
            if least <= low and high < least + (1 << bits) and (is_wide or bits < 4):
                return to, least
        return None

    if fitting(codes_of(parts["weight"][:_SAMPLE])) is None:
        return target, parts
    codes = codes_of(parts["weight"])
    found = fitting(codes)
    return (target, parts) if found is None else (found[0], {**parts, "weight": codes - found[1]})


def _divides(step: int, columns: int, group_size: int) -> bool:
    return columns % step == 0 and group_size % step == 0


def _offset(parts: Mapping[str, Tensor]) -> str:
    """The name of a group's floating offset; "none"."""
    if "minimum" in parts:
        return "minimum"
    return "zero" if "zero" in parts and parts["zero"].is_floating_point() else "none"


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
    if weight.layout is CODEBOOKS:
        return _fits_vectors(weight)
    if scale is None:
        return True
    assert weight.block is not None
    return group is None or bool((torch.bincount(group.long(), minlength=scale.shape[1]) == weight.block[1]).all())


def _fits_vectors(weight: PackedWeight) -> bool:
    """Whether vectors are of one row and cover its inputs as panels have them, codes in whole bytes for each input."""
    number, _, rows, columns = weight.parts["codebooks"].shape
    return rows == 1 and columns % 8 == 0 and 16 * number * weight.parts["weight"].itemsize % columns == 0


def _books_of(parts: Mapping[str, Tensor]) -> tuple[tuple[int, int, int], torch.dtype]:
    """What `Panels` says of codebooks."""
    if "codebooks" not in parts:
        return (0, 0, 0), torch.float32
    number, vectors, _, columns = parts["codebooks"].shape
    return (number, vectors, columns), parts["codebooks"].dtype


def _pack(
    weight: PackedWeight, parts: Mapping[str, Tensor], target: Layout, activation: ActivationType, codes: bool
) -> _native.Matrix | None:
    from amalgam import _native

    parts = {name: part.contiguous() for name, part in parts.items()}
    offset, scale, group, (rows, columns) = _offset(parts), parts.get("scale"), parts.get("group"), weight.shape
    scale_dtype = torch.float32 if scale is None else scale.dtype
    return _native.pack(
        kernels=extension.kernels(),
        format=_native.Format[target.name.removeprefix(_PREFIX)],
        columns=columns,
        weight=parts["weight"].flatten(1),
        scale=scale.view(torch.uint8) if scale is not None and scale.dtype.itemsize == 1 else scale,
        scale_dtype=extension.native_dtype(scale_dtype),
        block=weight.block or (rows, columns),
        zero=None if offset == "zero" else parts.get("zero"),
        offset=parts.get(offset),
        offset_kind=_native.Offset[offset],
        part_scale=parts.get("part_scale"),
        part_minimum=parts.get("part_minimum"),
        table=parts.get("table"),
        order=None if group is None else _order(group),
        quantizes=activation == "int8",
        codes=codes,
        books=books.squeeze(2) if (books := parts.get("codebooks")) is not None else None,
    )


def _order(group: Tensor) -> Tensor:
    """Inputs of a group side by side, in the order they have."""
    return torch.argsort(group.long(), stable=True).to(torch.int32)
