"""Integers of 2, 3, 4 or 8 bits in groups of inputs: published words → the runtime layout that holds the same values.

In: codes, scales, zero points, groups. Out: a `PackedWeight`: 2 to 4 bits become `int4` (a value keeps its distance
from its zero point), 8 bits `scaled8` if they are symmetric and in order, `affine8` otherwise. Layouts have groups of
one size: where the last group of a row is shorter, as GPTQ publishes it, all are cut into groups of a common divisor.
Must never know: checkpoint names, layers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from amalgam.errors import CheckpointError
from amalgam.kernels.layouts import AFFINE8, INT4, SCALED8, pack_nibbles, unpack_nibbles
from amalgam.kernels.weights import PackedWeight

WIDTHS = (2, 3, 4, 8)
# Kernels take groups in steps of so many inputs.
_UNIT = 8


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 `[rows, n]` → uint8 `[rows, 32 n // bits]`: each row one little-endian stream of bits, low bits first."""
    stream = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 8:
        return stream
    if bits == 4:
        return unpack_nibbles(stream)
    if bits == 2:
        return torch.stack([(stream >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)
    assert bits == 3, bits
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 3)).unflatten(-1, (-1, 3)).int()
    triple = stream[..., 0] | stream[..., 1] << 8 | stream[..., 2] << 16  # 8 values of 3 bits
    values = torch.stack([(triple >> shift) & 7 for shift in range(0, 24, 3)], dim=-1).flatten(-2)
    return values[..., : words.shape[-1] * 32 // 3].to(torch.uint8)


def unpack_whole(words: Tensor, bits: int) -> Tensor:
    """int32 `[rows, n]` → uint8 `[rows, n × (32 // bits)]`: no value crosses a word, the top bits are unused."""
    mask = (1 << bits) - 1
    values = [(words >> (bits * position)) & mask for position in range(32 // bits)]
    return torch.stack(values, dim=-1).flatten(-2).to(torch.uint8)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[rows, n]` below `2^bits` → int32 `[rows, ceil(n × bits / 32)]`: what `unpack_words` reads."""
    rows, count = codes.shape
    words = -(-count * bits // 32)
    padded = torch.nn.functional.pad(codes, (0, words * 32 // math.gcd(bits, 32) - count))
    if bits == 8:
        stream = padded
    elif bits == 4:
        stream = pack_nibbles(padded)
    elif bits == 2:
        quads = padded.unflatten(-1, (-1, 4))
        stream = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    else:
        assert bits == 3, bits
        eights = padded.unflatten(-1, (-1, 8)).int()
        triple = sum((eights[..., index] << (3 * index) for index in range(1, 8)), start=eights[..., 0])
        stream = torch.stack([(triple >> shift) & 255 for shift in (0, 8, 16)], dim=-1).flatten(-2).to(torch.uint8)
    # Behind `reshape` the stride is 1 also where one row or column made others look contiguous.
    return stream[:, : 4 * words].reshape(-1).contiguous().view(torch.int32).view(rows, words)


class Groups(NamedTuple):
    """What inputs share: scale, float, and zero, integers, `[out, groups]`; zero is None where it is the middle.

    `group` int32 `[in]` is the group of each input; None: `size` of them after one another, the last perhaps fewer.
    """

    scale: Tensor
    zero: Tensor | None = None
    group: Tensor | None = None
    size: int | None = None

    def even(self, columns: int) -> Groups:
        """The same groups, or parts of them, of one size; as they are where no multiple of 8 inputs divides them."""
        groups = self.scale.shape[1]
        size = columns // groups if self.size is None else min(self.size, columns)
        if self.group is None and size * groups == columns:
            return self._replace(size=size)
        index = torch.arange(columns) // size if self.group is None else self.group.long()
        counts = torch.bincount(index, minlength=groups)
        common = math.gcd(*counts.tolist())
        if common == int(counts.max()):
            return self._replace(size=common)
        if common % _UNIT:
            return self._replace(group=index.int(), size=max(1, columns // groups))
        # Input r of a group goes to part r // common of it.
        order = torch.argsort(index, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(columns) - (counts.cumsum(0) - counts)[index[order]]
        parts = counts // common
        finer = (parts.cumsum(0) - parts)[index] + rank // common
        whole = torch.arange(groups).repeat_interleave(parts)
        return Groups(
            self.scale[:, whole].contiguous(),
            None if self.zero is None else self.zero[:, whole].contiguous(),
            None if torch.equal(finer, torch.arange(columns) // common) else finer.int(),
            common,
        )


def from_codes(codes: Tensor, bits: int, groups: Groups) -> PackedWeight:
    """`(code - zero) × scale` as a packed weight; codes: uint8 `[out, in]`, below `2^bits`; zeros are 0 to `2^bits`."""
    shape = (codes.shape[0], codes.shape[1])
    middle = 1 << (bits - 1)
    if groups.zero is not None and bool((groups.zero == middle).all()):
        groups = groups._replace(zero=None)
    if bits <= 4 and shape[1] % 2 == 0:
        if groups.zero is None:
            codes = codes + (8 - middle)
        return from_nibbles(pack_nibbles(codes), shape, groups)
    scale, zero, index, size = groups.even(shape[1])
    assert size is not None
    if bits == 8 and zero is None and index is None:
        signed = (codes ^ 128).view(torch.int8)  # code - 128
        return PackedWeight(SCALED8, shape, {"weight": signed, "scale": scale.float()}, (1, size))
    parts = {"weight": codes.contiguous(), "scale": scale}
    parts["zero"] = torch.full(scale.shape, float(middle)) if zero is None else zero.float().contiguous()
    if index is not None:
        parts["group"] = index
    return PackedWeight(AFFINE8, shape, parts, (1, size))


def from_nibbles(nibbles: Tensor, shape: tuple[int, int], groups: Groups) -> PackedWeight:
    """`(nibble - zero) × scale`: the `int4` layout; zeros are 0 to 16."""
    scale, zero, index, size = groups.even(shape[1])
    assert size is not None
    parts = {"weight": nibbles, "scale": scale}
    if zero is not None and not bool((zero == 8).all()):
        parts["zero"] = zero.to(torch.uint8).contiguous()
    if index is not None:
        parts["group"] = index
    return PackedWeight(INT4, shape, parts, (1, size))


def group_index(weight: str, tensor: str, index: Tensor, groups: int, size: int | None) -> Tensor | None:
    """A stored `g_idx` as int32; None if it says what the order of inputs says anyway.

    Args:
        size: inputs of a group, where they are in order.

    Raises:
        CheckpointError: it names a group that does not exist.
    """
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, 0)
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"Tensor {tensor!r} of weight {weight!r} holds groups {low}..{high}.", remedy=f"Allowed: 0..{groups - 1}."
        )
    in_order = torch.arange(len(index)) // (max(1, len(index) // groups) if size is None else size)
    return None if torch.equal(index.long(), in_order) else index.to(torch.int32, copy=True).contiguous()
