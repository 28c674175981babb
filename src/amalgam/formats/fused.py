"""Tensors that hold several logical weights: all experts of a layer, gate and up in one, a projection transposed; and
tensors that hold one weight under another name.

In: a table of `FusedTensor`s, which the caller takes from the model's family, and a checkpoint's tensors. Out: every
logical weight's part as a `TensorSlice`, which formats read like a tensor of its own. Nothing is told from shapes:
which way round a tensor lies, and whether its rows alternate, only the table knows.
Must never know: layers, families, plans.

    transformers 5   gate_up_proj         [experts, 2 out, in]   first all gate rows, then all up rows
    gpt-oss, wide    gate_up_proj         [experts, in, 2 out]   transposed; gate, up, gate, up ...
    gpt-oss, MXFP4   gate_up_proj_blocks  [experts, 2 out, in / 32, 16]  rows alternate, not transposed
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from amalgam.checkpoint.store import TensorEntry
from amalgam.errors import CheckpointError, describe

# What follows a fused tensor's stored name → the part's role, and the logical weight's last name.
_SUFFIXES = {
    "": ("weight", "weight"),
    ".weight": ("weight", "weight"),
    "_bias": ("weight", "bias"),
    ".bias": ("weight", "bias"),
    "_scale_inv": ("weight_scale_inv", "weight"),
    "_activation_scale": ("activation_scale", "weight"),
    "_blocks": ("weight_packed", "weight"),
    "_scales": ("weight_scale", "weight"),
}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_WIDE = (torch.float32, torch.bfloat16, torch.float16)
# Every expert's part becomes an object before any config is asked; the largest published models have 200,000.
MAX_PIECES = 2**19


@dataclass(frozen=True)
class FusedTensor:
    """How one stored tensor holds logical weights.

    Attributes:
        stored: its name without a suffix, `model.layers.{}.mlp.experts.gate_up_proj`; `{}` stands for a number.
        modules: the logical modules that share its rows equally, `model.layers.{}.mlp.experts.{}.gate_proj`, in order.
            Numbers of `stored` come first; a last `{}` is the expert.
        is_stacked: the first dimension counts experts.
        is_transposed: wide weights lie `[in, out]`; biases and packed weights never do.
        is_interleaved: rows of the modules alternate instead of standing one module after the other.
        is_tensor: both names are those of one wide tensor, not of modules.
    """

    stored: str
    modules: tuple[str, ...]
    is_stacked: bool = True
    is_transposed: bool = False
    is_interleaved: bool = False
    is_tensor: bool = False

    @property
    def is_renamed(self) -> bool:
        """Whether it holds one whole weight, in any format, and only its module is called otherwise."""
        is_cut = self.is_stacked or self.is_transposed or self.is_interleaved
        return len(self.modules) == 1 and not is_cut and not self.is_tensor


@dataclass(frozen=True, slots=True)
class TensorSlice:
    """A part of a stored tensor that stands for a tensor of its own; has what a `TensorEntry` has.

    Attributes:
        whole: the stored tensor.
        index: position along its first dimension; None if all of it belongs to one expert.
        rows: `(start, stop, step)` along the output dimension; None: all, or it has none.
        shape: of the slice.
        is_transposed: outputs are the last dimension of `whole`.
    """

    whole: TensorEntry
    index: int | None
    rows: tuple[int, int, int] | None
    shape: tuple[int, ...]
    is_transposed: bool = False

    @property
    def name(self) -> str:
        """The stored tensor's name and an index expression: `….gate_up_proj[3, 0:64:2]`."""
        steps = [] if self.index is None else [str(self.index)]
        steps += [":"] if self.is_transposed else []
        if self.rows is not None:
            start, stop, step = self.rows
            steps.append(f"{start}:{stop}" if step == 1 else f"{start}:{stop}:{step}")
        return f"{self.whole.name}[{', '.join(steps)}]"

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def encoding(self) -> str | None:
        return self.whole.encoding

    @property
    def file(self) -> Path:
        return self.whole.file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def offset(self) -> int | None:
        """First byte in the file; None if the slice's bytes are not one run, or the container does not tell."""
        first, _, step = self.rows or (0, 0, 1)
        if self.whole.offset is None or self.is_transposed or step != 1:
            return None
        item = math.prod(self.whole.shape[1:]) if self.index is not None else self.whole.nbytes // self.dtype.itemsize
        row = self.nbytes // self.dtype.itemsize // max(self.shape[0], 1) if self.rows is not None else 0
        return self.whole.offset + ((self.index or 0) * item + first * row) * self.dtype.itemsize

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the whole tensor's data, without copying."""
        part = tensor if self.index is None else tensor[self.index]
        if self.is_transposed:
            part = part.t()
        if self.rows is not None:
            start, stop, step = self.rows
            part = part[start:stop:step]
        return part.view(self.shape) if part.dim() > len(self.shape) else part


TensorPart = TensorEntry | TensorSlice


def lines_of(part: TensorPart, start: int, stop: int) -> TensorPart:
    """Lines `start` to `stop` of a part's first dimension; a tensor of its own where they are one run of bytes."""
    shape = (stop - start, *part.shape[1:])
    if isinstance(part, TensorEntry):
        part = TensorSlice(part, None, (start, stop, 1), shape)
    else:
        first, _, step = part.rows or (0, part.shape[0], 1)
        part = replace(part, rows=(first + start * step, first + stop * step, step), shape=shape)
    if part.offset is None:
        return part
    return TensorEntry(part.name, part.dtype, shape, part.file, part.offset, part.encoding)


def whole_of(part: TensorPart) -> TensorEntry:
    """The stored tensor that a part lies in."""
    return part.whole if isinstance(part, TensorSlice) else part


@dataclass(frozen=True)
class Piece:
    """One part of one logical weight."""

    weight: str
    role: str
    part: TensorPart


def split_fused(
    tensors: Mapping[str, TensorEntry], table: Sequence[FusedTensor], block_rows: int | None
) -> tuple[list[Piece], list[str]]:
    """The parts of all fused tensors, and the names of the tensors that are not fused.

    Args:
        tensors: name → tensor of the checkpoint.
        block_rows: rows that share a scale, where the checkpoint declares blocks.

    Raises:
        CheckpointError: a fused tensor's shape cannot be what the table says.
    """
    by_name = {
        fused.stored + suffix: (fused, suffix)
        for fused in table
        if not fused.is_renamed
        for suffix in ([""] if fused.is_tensor else _SUFFIXES)
    }
    ends = tuple({stored.rpartition("{}")[2] for stored in by_name})  # a quick look before the regular expression
    pieces: list[Piece] = []
    others: list[str] = []
    for name, entry in tensors.items():
        found = by_name.get(_NUMBER.sub("{}", name)) if name.endswith(ends) else None
        if found is None:
            others.append(name)
            continue
        fused, suffix = found
        weight = tensors.get(name[: len(name) - len(suffix)]) or tensors.get(
            f"{name[: len(name) - len(suffix)]}.weight"
        )
        num_experts = entry.shape[0] if fused.is_stacked and entry.shape else 1
        check_num_pieces(len(pieces) + num_experts * len(fused.modules), entry)
        pieces += _split(entry, fused, suffix, weight, block_rows, _NUMBER.findall(name))
    return pieces, others


def logical_module(module: str, table: Sequence[FusedTensor]) -> str:
    """The logical name of a module that is stored under another one; its own otherwise."""
    pattern = _NUMBER.sub("{}", module)
    renamed = next((fused for fused in table if fused.is_renamed and fused.stored == pattern), None)
    return module if renamed is None else renamed.modules[0].format(*_NUMBER.findall(module))


def check_num_pieces(num_pieces: int, entry: TensorEntry) -> None:
    """
    Raises:
        CheckpointError: stacks of experts have more parts than any model; `entry` is the last one looked at.
    """
    if num_pieces > MAX_PIECES:
        raise CheckpointError(
            f"Tensor {describe(entry.name)} in {entry.file} has shape {list(entry.shape)}: with it, stacks of experts "
            f"have more than {MAX_PIECES} parts.",
            remedy="No model has so many experts: is the file damaged?",
        )


def _split(
    entry: TensorEntry,
    fused: FusedTensor,
    suffix: str,
    weight: TensorEntry | None,
    block_rows: int | None,
    numbers: Iterable[str],
) -> Iterator[Piece]:
    role, last = _SUFFIXES[suffix]
    shape = entry.shape
    is_matrix = last == "weight" and role == "weight" and not fused.is_tensor
    if len(shape) < fused.is_stacked + is_matrix + 1 and role != "activation_scale":
        _refuse(entry, f"{'experts, ' if fused.is_stacked else ''}outputs, …")
    num_items = shape[0] if fused.is_stacked else 1
    inner = shape[1:] if fused.is_stacked else shape
    is_transposed = fused.is_transposed and role == "weight" and last == "weight"
    if is_transposed:
        if entry.dtype not in _WIDE or len(inner) != 2:
            _refuse(entry, "a floating [experts, inputs, outputs]")
        inner = inner[::-1]
    ranges: list[tuple[int, int, int] | None]
    if role == "activation_scale":
        ranges = [None] * len(fused.modules)
    else:
        ranges = list(_rows(entry, fused, inner[0], _block_of(fused, role, inner[0], weight, block_rows, entry)))
        inner = (inner[0] // len(fused.modules), *inner[1:])
        if role == "weight_packed":  # [outputs, blocks, bytes of a block]
            if len(inner) != 3:
                _refuse(entry, "[experts, outputs, blocks, 16]")
            inner = (inner[0], inner[1] * inner[2])
    for index in range(num_items):
        position = index if fused.is_stacked else None
        names = (*numbers, str(index))
        for module, rows in zip(fused.modules, ranges, strict=True):
            part = TensorSlice(entry, position, rows, inner, is_transposed)
            logical = module.format(*names)
            yield Piece(logical if fused.is_tensor else f"{logical}.{last}", role, part)


def _rows(entry: TensorEntry, fused: FusedTensor, total: int, per_module: int) -> Iterator[tuple[int, int, int]]:
    num = len(fused.modules)
    if total != per_module * num:
        _refuse(entry, f"{num} equal parts of {per_module} rows")
    for position in range(num):
        if fused.is_interleaved:
            yield position, total, num
        else:
            yield position * per_module, (position + 1) * per_module, 1


def _block_of(
    fused: FusedTensor,
    role: str,
    total: int,
    weight: TensorEntry | None,
    block_rows: int | None,
    entry: TensorEntry,
) -> int:
    """Rows of a tensor that belong to each module; a scale per block must not be shared between two modules."""
    num = len(fused.modules)
    if role != "weight_scale_inv" or weight is None or num == 1:
        return total // num
    rows = weight.shape[1 if fused.is_stacked else 0] // num
    if block_rows is None or fused.is_interleaved:
        _refuse(entry, "a declared weight_block_size, and modules one after the other")
    each = -(-rows // block_rows)
    if rows % block_rows and num * each == -(-rows * num // block_rows):
        _refuse(entry, f"modules of whole blocks of {block_rows} rows; these have {rows}, so that blocks may be shared")
    return each


def _refuse(entry: TensorEntry, expected: str) -> NoReturn:
    raise CheckpointError(
        f"Fused tensor {entry.name!r} has type {str(entry.dtype).removeprefix('torch.')} and shape {list(entry.shape)} "
        f"in {entry.file.name}.",
        remedy=f"The model's family stores {expected} here.",
    )
