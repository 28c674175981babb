"""How the values of a weight are stored, in no layout's words, so that layouts can be compared and exchanged.

In: a weight as a source stores it. Out: its `Form`, or None where none describes it: tables of a quantizer's own,
nested scales, floating zero points, factors of single inputs. Reads headers only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from amalgam.composition.planned import PlannedWeight
from amalgam.formats.contract import Scheme, StoredWeight, WritableFormat
from amalgam.formats.registry import all_formats

Kind = Literal["float", "int", "fp8", "mxfp4", "mxfp8", "nvfp4"]
Strategy = Literal["", "tensor", "channel", "group", "block"]


@dataclass(frozen=True)
class Form:
    """Values and scales of a weight.

    Attributes:
        kind: floating values as they are; integers; E4M3; or one of the block formats, which imply their groups.
        bits: of one value.
        strategy: which of them share a scale.
        block: (rows, columns) that share one, where the strategy is group or block.
        has_zero: integers have zero points, integers too.
        is_reordered: integers in groups whose inputs need not be neighbours.
        is_packed: integers lie in 32-bit words; else each has a byte.
        dtype: of floating values.
    """

    kind: Kind
    bits: int
    strategy: Strategy = ""
    block: tuple[int, int] | None = None
    has_zero: bool = False
    is_reordered: bool = False
    is_packed: bool = False
    dtype: torch.dtype | None = None

    def __str__(self) -> str:
        if self.kind == "float":
            return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.dtype or torch.float32, "fp32")
        if self.kind not in ("int", "fp8"):
            return self.kind
        name = "fp8" if self.kind == "fp8" else f"int{self.bits}{' in words' * (self.is_packed and self.bits == 8)}"
        shared = {
            "group": f"groups of {self.block[1]}" if self.block else "",
            "block": f"blocks of {self.block[0]}×{self.block[1]}" if self.block else "",
        }.get(self.strategy, f"per {self.strategy}")
        extras = ", zero points" * self.has_zero + ", reordered" * self.is_reordered
        return f"{name}, {shared}{extras}"

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Of a weight, its scales and zero points, about."""
        values = math.prod(shape) * self.bits // 8
        if self.is_float or len(shape) != 2:
            return values
        rows, columns = shape
        height, width = self.block or {"tensor": (rows, columns), "channel": (1, columns)}[self.strategy]
        scales = -(-rows // height) * -(-columns // width)
        each = {"int": 2 if self.is_packed else 4, "fp8": 4}.get(self.kind, 1)
        return values + scales * (each + (self.has_zero * self.bits + 7) // 8) + 4 * columns * self.is_reordered

    def format_name(self) -> str:
        """Of the format of ours that has this form."""
        if self.kind != "int":
            return self.kind
        return "int8-packed" if self.bits == 8 and self.is_packed else f"int{self.bits}"


def floating(dtype: torch.dtype) -> Form:
    return Form("float", dtype.itemsize * 8, dtype=dtype)


def form_of(weight: PlannedWeight) -> Form | None:
    """Of a weight as the plan has it: as it is stored, or as it is quantized while loading."""
    if weight.quantize_to is not None:
        return _made_form(weight.quantize_to, weight.slot.shape)
    return stored_form(weight.stored)


def stored_form(stored: StoredWeight) -> Form | None:
    """Of a weight in a source's layout."""
    name = stored.format.name
    if stored.is_wide:
        dtype = next(iter(stored.parts.values())).dtype
        return floating(dtype)
    if "pre_quant_scale" in stored.parts or stored.block is None:
        return None
    plain = _BY_NAME.get(name)
    if plain is None:
        return None
    if plain.kind in ("mxfp4", "mxfp8", "nvfp4"):
        return plain if plain.block == stored.block else None
    if plain.kind == "int" and stored.shape[1] % stored.block[1]:
        return None  # a shorter last group, which is cut into smaller ones in memory
    declared = stored.declared
    strategy, block = _shared(stored.shape, stored.block)
    if strategy == "channel" and declared.strategy == "group" and declared.group_size == stored.block[1]:
        strategy, block = "group", stored.block  # of a weight that is one group wide
    return replace(
        plain,
        strategy=strategy,
        block=block,
        has_zero="weight_zero_point" in stored.parts
        or ("qzeros" in stored.parts and declared.is_symmetric is not True),
        is_reordered=strategy == "group" and (declared.is_reordered or "weight_g_idx" in stored.parts),
    )


def _made_form(made: WritableFormat, shape: tuple[int, ...]) -> Form:
    grid = made.grid(shape, torch.float32)
    strategy: Strategy = grid.strategy  # type: ignore[assignment]
    block = grid.block if strategy in ("group", "block") else None
    return replace(_BY_NAME[made.name], strategy=strategy, block=block)


def _shared(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[Strategy, tuple[int, int] | None]:
    """Which weights share a scale. A matrix of one row has channels, and one of one block has a tensor's scale."""
    if block[0] == 1:
        return ("channel", None) if block[1] >= shape[1] else ("group", block)
    is_whole = block[0] >= shape[0] and block[1] >= shape[1]
    return ("tensor", None) if is_whole and block != (128, 128) else ("block", block)


_BY_NAME: dict[str, Form] = {
    "fp8": Form("fp8", 8),
    "int8": Form("int", 8),
    "bnb-int8": Form("int", 8),
    "int8-packed": Form("int", 8, is_packed=True),
    "gptq-int8": Form("int", 8, is_packed=True),
    "awq-int4": Form("int", 4, is_packed=True),
    "modelopt-int4": Form("int", 4, is_packed=True),
    "gguf_q8_0": Form("int", 8, is_packed=True),
    "gguf_q4_0": Form("int", 4, is_packed=True),
    **{f"int{bits}": Form("int", bits, is_packed=True) for bits in (2, 3, 4)},
    **{f"gptq-int{bits}": Form("int", bits, is_packed=True) for bits in (2, 3, 4)},
    "mxfp4": Form("mxfp4", 4, "group", (1, 32)),
    "mxfp8": Form("mxfp8", 8, "group", (1, 32)),
    "nvfp4": Form("nvfp4", 4, "group", (1, 16)),
    "modelopt-nvfp4": Form("nvfp4", 4, "group", (1, 16)),
}


def exact_forms(form: Form, shape: tuple[int, ...]) -> Iterator[Form]:
    """Forms that hold the same values of a weight `[out, in]`: itself first, then about in the order of their size."""
    for same in (form, *_other_scales(form, shape)):
        yield same
        if same.kind != "int":
            continue
        if same.bits in (2, 3):
            yield replace(same, bits=4)
        if not same.is_packed:
            yield replace(same, is_packed=True)
        if same.bits < 8:  # code - zero point has a bit more than the code
            yield replace(same, bits=8, has_zero=False)
        if not same.is_reordered and (same.bits < 8 or not same.has_zero):
            yield replace(same, bits=8, has_zero=False, is_packed=False)


def _other_scales(form: Form, shape: tuple[int, ...]) -> Iterator[Form]:
    """The same scales, told otherwise or repeated."""
    if form.kind not in ("int", "fp8"):
        return
    if form.strategy == "tensor":
        yield replace(form, strategy="channel")
    if form.strategy == "group" and form.block == (1, shape[1]):
        yield replace(form, strategy="channel", block=None)
    if form.strategy in ("channel", "tensor") and form.kind == "int":
        yield replace(form, strategy="group", block=(1, shape[1]))


def is_published(form: Form, stored: StoredWeight) -> bool:
    """Whether a stored weight has the tensors of compressed-tensors' layout of a form, byte by byte."""
    return stored.format.name == form.format_name() and "weight_scale_inv" not in stored.parts and not stored.is_wide


def writable(form: Form) -> WritableFormat | None:
    """The format that makes a form of floating values."""
    name = form.format_name()
    found = next((each for each in all_formats() if each.name == name), None)
    return found if isinstance(found, WritableFormat) and not form.is_reordered else None


def scheme_of(form: Form) -> Scheme:
    """As compressed-tensors declares it."""
    if form.kind == "nvfp4":
        arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        return Scheme("nvfp4-pack-quantized", arguments | {"symmetric": True, "dynamic": False})
    if form.kind == "mxfp4":
        scales = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        arguments = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
        return Scheme("mxfp4-pack-quantized", arguments | {"symmetric": True, "dynamic": False} | scales)
    if form.kind == "mxfp8":
        scales = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        arguments = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32}
        return Scheme("mxfp8-quantized", arguments | {"symmetric": True, "dynamic": False} | scales)
    arguments = {
        "num_bits": form.bits,
        "type": "int" if form.kind == "int" else "float",
        "symmetric": not form.has_zero,
        "strategy": form.strategy,
        "dynamic": False,
    }
    if form.strategy == "group" and form.block:
        arguments["group_size"] = form.block[1]
    if form.strategy == "block" and form.block:
        arguments["block_structure"] = list(form.block)
    if form.is_reordered:
        arguments["actorder"] = "group"
    packed = "pack-quantized" if form.is_packed else "int-quantized"
    return Scheme(packed if form.kind == "int" else "float-quantized", arguments)
