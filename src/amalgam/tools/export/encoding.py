"""A weight in memory → the tensors of a form, in the layouts of compressed-tensors and of ModelOpt.

In: a `PackedWeight` in a runtime layout (`kernels.layouts`) and the `Form` that it is to have. Out: tensors by suffix.
Codes, scales and zero points stay what they are; only floating values are rounded, and only where a form asks for it.
Must never know: names, files, why a form was chosen.

    compressed-tensors   formats.pack_quantized, scaled8, mxfp4, mxfp8, nvfp4 have the drawings
    ModelOpt             formats.modelopt and nvfp4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from amalgam.errors import UnsupportedError
from amalgam.formats.common.integers import pack_words
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import dense, unpack_nibbles
from amalgam.kernels.weights import PackedWeight
from amalgam.quantizers.contract import quantize
from amalgam.quantizers.nearest import round_to_nearest
from amalgam.tools.export.forms import Form, writable


@dataclass(frozen=True)
class Parts:
    """What integers are made of.

    Attributes:
        codes: int16 `[out, in]`, signed: value = (code - zero) × scale.
        scale: float `[out, groups]`.
        zero: int16 as scale, or None: 0.
        group: int32 `[in]`, the group of each input; None: in order.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group: Tensor | None


def converted(name: str, packed: PackedWeight, form: Form, is_same: bool) -> PackedWeight:
    """A weight that has a form: itself where its values are to stay, and else rounded to it.

    Args:
        name: for messages.
        is_same: whether the form holds the same values.
    """
    if is_same:
        return packed
    values = packed.dequantize(torch.float32)
    if form.is_float:
        return dense(values.to(form.dtype))
    made = writable(form)
    if made is None:
        raise UnsupportedError(f"Weight {name!r} cannot be made {form}.", remedy="Choose another source for it.")
    options = QuantizeOptions(
        group_size=form.block[1] if form.kind == "int" and form.block else None,
        scale=form.strategy if form.kind in ("int", "fp8") else None,
        has_zero_points=form.has_zero,
    )
    return made.pack(quantize(values, made, round_to_nearest, options))


def compressed_tensors(name: str, packed: PackedWeight, form: Form) -> dict[str, Tensor]:
    """The tensors of compressed-tensors' layout by suffix.

    Raises:
        UnsupportedError: a zero point that its bits cannot hold.
    """
    if form.is_float:
        return {"weight": packed.dense}
    if form.kind == "int":
        return _integers(name, packed, form)
    scale = packed.parts["scale"]
    if form.kind == "fp8":
        return {"weight": packed.parts["weight"], "weight_scale": _scale_of_fp8(packed, form)}
    if form.kind == "mxfp8":
        return {"weight": packed.parts["weight"], "weight_scale": scale.view(torch.uint8)}
    if form.kind == "mxfp4":
        return {"weight_packed": packed.parts["weight"], "weight_scale": scale.view(torch.uint8)}
    return {"weight_packed": packed.parts["weight"], "weight_scale": scale, "weight_global_scale": _divisor(packed)}


def modelopt(name: str, packed: PackedWeight, form: Form) -> dict[str, Tensor]:
    """The tensors of ModelOpt's layout by suffix; forms without one are refused before."""
    if form.is_float:
        return {"weight": packed.dense}
    if form.kind == "int" and form.bits == 4:
        parts = integers_of(name, packed, form)
        nibbles = (parts.codes & 15).to(torch.uint8)
        return {"weight": nibbles[0::2] | (nibbles[1::2] << 4), "weight_scale": parts.scale}
    if form.kind == "int":
        parts = integers_of(name, packed, form)
        return {"weight": parts.codes.to(torch.int8), "weight_scale": parts.scale.float().reshape(-1)}
    scale = packed.parts["scale"]
    if form.kind == "fp8":
        scale = _scale_of_fp8(packed, form)
        scale = scale[:, None, :, None] if form.strategy == "block" else scale.reshape(-1)
        return {"weight": packed.parts["weight"], "weight_scale": scale.contiguous()}
    if form.kind == "mxfp8":
        return {"weight": packed.parts["weight"], "weight_scale": scale.view(torch.uint8)}
    factor = packed.parts.get("factor")
    whole = 1 / packed.parts["divisor"] if factor is None else factor
    return {"weight": packed.parts["weight"], "weight_scale": scale, "weight_scale_2": whole.reshape(())}


def integers_of(name: str, packed: PackedWeight, form: Form) -> Parts:
    """Codes of so many bits that mean the same; zero points go into the codes where the form has none.

    Raises:
        UnsupportedError: they do not fit.
    """
    middle = 1 << (form.bits - 1)
    layout = packed.layout.name
    zero: Tensor | None = None
    if layout == "scaled8":
        codes = packed.parts["weight"].short()
    elif layout == "int4":
        codes = unpack_nibbles(packed.parts["weight"]).short()
        zero = packed.parts["zero"].short() if "zero" in packed.parts else None
        codes, zero = (codes - 8, None) if zero is None else (codes - middle, zero - middle)
    else:
        assert layout == "affine8", layout
        codes = packed.parts["weight"].short() - 128
        zero = packed.parts["zero"].round().short() - 128
    scale, group = packed.parts["scale"], packed.parts.get("group")
    if form.has_zero and zero is None:
        zero = torch.zeros(scale.shape, dtype=torch.int16)
    if not form.has_zero and zero is not None:
        each = zero.repeat_interleave(codes.shape[1] // zero.shape[1], 1) if group is None else zero[:, group.long()]
        codes, zero = codes - each, None
    for what, values in (("value", codes), ("zero point", zero)):
        if values is not None and (int(values.min()) < -middle or int(values.max()) >= middle):
            raise UnsupportedError(
                f"Weight {name!r} has a {what} that {form.bits} bits do not hold here.",
                remedy="Choose another source for it.",
            )
    return Parts(codes, scale, zero, group)


def _integers(name: str, packed: PackedWeight, form: Form) -> dict[str, Tensor]:
    parts = integers_of(name, packed, form)
    scale = parts.scale
    if form.strategy == "tensor":
        scale = scale.reshape(-1)[:1]
    if not form.is_packed:
        tensors = {"weight": parts.codes.to(torch.int8), "weight_scale": scale}
        if parts.zero is not None:
            tensors["weight_zero_point"] = parts.zero.to(torch.int8).reshape(scale.shape)
        return tensors
    middle = 1 << (form.bits - 1)
    tensors = {
        "weight_packed": pack_words((parts.codes + middle).to(torch.uint8), form.bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
    }
    if parts.zero is not None:
        words = pack_words((parts.zero + middle).to(torch.uint8).t().contiguous(), form.bits)
        tensors["weight_zero_point"] = words.t().contiguous()
    if form.is_reordered:
        group = parts.group
        if group is None:
            group = torch.arange(packed.shape[1], dtype=torch.int32) // (packed.shape[1] // scale.shape[1])
        tensors["weight_g_idx"] = group.int()
    return tensors


def _scale_of_fp8(packed: PackedWeight, form: Form) -> Tensor:
    """float32: `[1]`, `[out, 1]` or a matrix of blocks."""
    scale = packed.parts["scale"].float()
    if form.strategy == "tensor":
        return scale.reshape(-1)[:1].clone()
    if form.strategy == "channel":
        return scale.expand(packed.shape[0], 1).contiguous()
    return scale


def _divisor(packed: PackedWeight) -> Tensor:
    if "divisor" in packed.parts:
        return packed.parts["divisor"].reshape(1)
    return (1 / packed.parts["factor"]).reshape(1)
