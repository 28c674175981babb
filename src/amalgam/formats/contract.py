"""The contract of a weight format, and what formats need to fulfil it.

In: tensors by name and a checkpoint's declared quantization. Out: packed weights.
Must never know: layers, families, requests.

A *format* is a published layout: one logical weight (`model.layers.0.mlp.up_proj.weight`) stored as one or more tensors
(`….weight_packed`, `….weight_scale`). To add one, write a file in `formats/` that exports `FORMAT` (or
`FORMATS`); outside the package, point the entry point `amalgam.formats` at such an object.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from amalgam.errors import CheckpointError, ConfigError
from amalgam.formats.declared.values import UNDECLARED, Declared
from amalgam.formats.fused import TensorPart, lines_of
from amalgam.formats.grid import Codes, Encoded, Grid, QuantizeOptions
from amalgam.kernels.weights import Layout, PackedWeight

WEIGHT_SUFFIX = "weight"
DEFAULT_GROUP_SIZE = 128
# What quantizers store beside a weight for the activations, which stay wide here.
ACTIVATION_SUFFIXES = frozenset({"input_scale", "input_zero_point", "input_global_scale", "activation_scale"})
Read = Callable[[TensorPart], Tensor]
# What `WeightFormat.lines` may say of a part besides a number: rows that share a scale share a line; or the part
# is only true of the whole weight.
ROWS_SHARE, ONLY_OF_ALL = -1, -2


@dataclass(frozen=True)
class StoredWeight:
    """One logical weight as a source publishes it.

    Attributes:
        name: logical name, `model.layers.0.mlp.up_proj.weight`.
        format: the format that recognised it.
        shape: logical shape, `(out, in)` for a linear weight.
        parts: role (the suffix after the module's name) → tensor, or the slice of a fused one.
        block: `(rows, columns)` that share one scale, where the format has scales.
        bits: of one value, where the format is not wide.
        declared: what the checkpoint declares for the module.
        arrange: brings the stored rows into the published order; None if they are in it.
    """

    name: str
    format: WeightFormat
    shape: tuple[int, ...]
    parts: Mapping[str, TensorPart]
    block: tuple[int, int] | None = None
    bits: int | None = None
    declared: Declared = UNDECLARED
    arrange: Callable[[Tensor], Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.parts.values())

    @property
    def is_wide(self) -> bool:
        """Whether the values are stored unquantized."""
        return self.format.is_wide


@dataclass(frozen=True)
class ModuleContext:
    """What is known of a module besides its tensors' headers.

    Attributes:
        declared: what the checkpoint declares for it.
        read: reads one of its tensors; only for small ones that hold shapes and settings instead of weights.
    """

    declared: Declared
    read: Read


@dataclass(frozen=True)
class Scheme:
    """A quantization as compressed-tensors declares it: the layout's name and its `QuantizationArgs`."""

    layout: str
    arguments: Mapping[str, Any]


class WeightFormat(ABC):
    """One family of layouts. Stateless."""

    name: str
    """Short name shown to users: `bf16`, `fp8`, `int4`."""
    is_wide = False
    """Whether the values are stored unquantized."""
    has_vectors = False
    """Whether a code stands for several values, so that no value has steps of its own."""
    required: frozenset[str] = frozenset({WEIGHT_SUFFIX})
    """Suffixes that a weight of this format always has."""
    optional: frozenset[str] = frozenset()
    """Suffixes that it may have; nothing else may be present."""
    layouts: tuple[Layout, ...]
    """The runtime layouts that `load` gives: some of `kernels.layouts`, or the format's own."""
    anchor: str | None = None
    """Set where the other suffixes are everyday words (`scale`, `shape`): they belong to it only beside this one."""
    methods: frozenset[str] = frozenset()
    """The `quant_method`s whose checkpoints hold it; empty: not compared."""
    number: str | None = None
    """Kind of the stored values, `int` or `float`; None: not compared."""
    bits: int | None = None
    """Of a stored value, where it is the same for every weight of the format; None: not compared."""

    def is_possible(self, declared: Declared) -> bool:
        """Whether a declaration leaves room for this format; for weights whose headers are not there."""
        return (
            (declared.method is None or not self.methods or declared.method in self.methods)
            and (None in (declared.number, self.number) or declared.number == self.number)
            and (None in (declared.bits, self.bits) or declared.bits == self.bits)
        )

    @abstractmethod
    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        """The weight that `parts` (whose suffixes fit) hold, or None if another format's.

        Raises:
            CheckpointError: it is this format's, but its shapes or types contradict each other.
        """

    @abstractmethod
    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        """Pack one weight; the result shares no memory with the file."""

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        """How the rows of a weight lie in a part, if the part's first dimension counts them.

        Returns how many rows each line holds, `ROWS_SHARE` where `block[0]` of them share one; 0 for a part that
        belongs to all rows, `ONLY_OF_ALL` for one that does not describe a few of them; None where a few rows cannot be
        had without the others.
        """
        return None

    @abstractmethod
    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        """Bytes of a packed weight of this shape."""


class WritableFormat(WeightFormat):
    """One that checkpoints can be written in."""

    @abstractmethod
    def grid(self, shape: tuple[int, ...], dtype: torch.dtype, options: QuantizeOptions = QuantizeOptions()) -> Grid:
        """The values that a weight `[out, in]` can take.

        Args:
            dtype: of the unquantized weight.

        Raises:
            ConfigError: an option that does not apply, or one that does not fit the shape.
        """

    @abstractmethod
    def encode(self, codes: Codes) -> Encoded:
        """Codes on a grid of this format in the published layout."""

    @abstractmethod
    def pack(self, encoded: Encoded) -> PackedWeight:
        """Pack what `encode` made, without a file in between."""

    @abstractmethod
    def scheme(self, grid: Grid) -> Scheme:
        """How a checkpoint declares weights on a grid."""


def cut(stored: StoredWeight, start: int, stop: int) -> StoredWeight | None:
    """Rows `start` to `stop` of a matrix as a weight of its own; None where the format has them only with the others.

    It is read by the format's `load` as if it were all there is: fine for a look at some rows.
    """
    if stored.arrange is not None or len(stored.shape) != 2:
        return None
    parts: dict[str, TensorPart] = {}
    for role, part in stored.parts.items():
        each = stored.format.lines(stored, role)
        if each is None:
            return None
        if each in (0, ONLY_OF_ALL):
            if each == 0:
                parts[role] = part
            continue
        first, last = start, stop
        if each == ROWS_SHARE:
            assert stored.block is not None
            first, last = start // stored.block[0], (stop - 1) // stored.block[0] + 1
            if last - first > 1:
                return None
        elif start % each or (stop % each and stop != stored.shape[0]):
            return None
        else:
            first, last = start // each, -(-stop // each)
        parts[role] = lines_of(part, first, last)
    return replace(stored, shape=(stop - start, stored.shape[1]), parts=parts)


def owned(tensor: Tensor) -> Tensor:
    """A contiguous copy that shares nothing with a file's pages."""
    return tensor.clone(memory_format=torch.contiguous_format)


def finite(stored: StoredWeight, role: str, tensor: Tensor) -> Tensor:
    """A part's data; raise CheckpointError if it holds NaN or infinity."""
    wide = tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
    if not bool(torch.isfinite(wide).all()):
        part = stored.parts[role]
        raise CheckpointError(
            f"Tensor {part.name!r} of weight {stored.name!r} holds NaN or infinity in {part.file.name}.",
            remedy="The file is damaged, or its quantization failed: download it again or quantize anew.",
        )
    return tensor


def expect_shape(name: str, entry: TensorPart, allowed: tuple[int, ...]) -> None:
    """Raise CheckpointError unless a tensor has the shape that its neighbours imply."""
    if entry.shape != allowed:
        raise CheckpointError(
            f"Tensor {entry.name!r} of weight {name!r} has shape {list(entry.shape)} in {entry.file.name}.",
            remedy=f"Expected {list(allowed)}.",
        )


def refuse_part(name: str, entry: TensorPart, remedy: str) -> NoReturn:
    """Raise CheckpointError about a tensor whose type or shape cannot be."""
    raise CheckpointError(
        f"Tensor {entry.name!r} of weight {name!r} has type {str(entry.dtype).removeprefix('torch.')} and shape "
        f"{list(entry.shape)} in {entry.file.name}.",
        remedy=remedy,
    )


def expect_dtype(name: str, entry: TensorPart, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise CheckpointError unless a tensor has one of the allowed types."""
    if entry.dtype not in allowed:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in allowed)
        raise CheckpointError(
            f"Tensor {entry.name!r} of weight {name!r} has type {str(entry.dtype).removeprefix('torch.')} "
            f"in {entry.file.name}.",
            remedy=f"Expected {kinds}.",
        )


def group_block(name: str, scale: TensorPart, columns: int, num_groups: int, declared: Declared) -> tuple[int, int]:
    """`(1, inputs of a group)` of a weight with several scales in a row; the last group may have fewer inputs.

    Raises:
        CheckpointError: the declared size of groups makes another number of them, or none is declared and it is needed.
    """
    size = declared.group_size
    if size is not None and 0 < size and -(-columns // size) == num_groups:
        return 1, min(size, columns)
    if num_groups and columns % num_groups == 0:
        return 1, columns // num_groups
    says = f"declares groups of {size}" if size is not None else "declares no group_size"
    fitting = -(-columns // max(1, num_groups))
    raise CheckpointError(
        f"Weight {name!r} has {num_groups} groups for {columns} inputs in {scale.file.name}, and "
        f"{declared.where or 'the checkpoint'} {says}.",
        remedy=f"Groups of {fitting} would be as many: does the config belong to these weights?",
    )


def group_size_of(columns: int, wanted: int | None) -> int:
    """Inputs of a group of a weight that is made.

    Raises:
        ConfigError: the wish does not divide the inputs.
    """
    # Without a wish: the default, or the largest power of two below it that divides.
    group = wanted or math.gcd(columns, DEFAULT_GROUP_SIZE)
    if columns % group:
        fitting = [str(size) for size in (256, 128, 64, 32, 16, 8) if columns % size == 0]
        raise ConfigError(
            f"group_size {group} does not divide the {columns} inputs of this weight.",
            remedy=f"{' and '.join(fitting)} divide it; without a group_size each weight gets the largest power of "
            f"two up to {DEFAULT_GROUP_SIZE} that divides its inputs.",
        )
    return group


def expect_index(name: str, role: str, parts: Mapping[str, TensorPart], num_groups: int, declared: Declared) -> None:
    """Raise CheckpointError if groups in an order of their own have no index that tells it."""
    if declared.is_reordered and num_groups > 1 and role not in parts:
        raise CheckpointError(
            f"{declared.where} declares {name!r} with groups in the order of activations, but it has no {role}, which "
            "tells the group of each input.",
            remedy="Download the checkpoint again, or set desc_act (actorder) to false if inputs are in order.",
        )
