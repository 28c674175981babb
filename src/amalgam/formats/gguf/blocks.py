"""GGUF's simple block types: 32 neighbours of a row share one scale.

    Q4_0    d f16 | 16 bytes of nibbles             d (q - 8)
    Q4_1    d f16 | m f16 | nibbles                 d q + m
    Q5_0    d f16 | 32 fifth bits | nibbles         d (q - 16)
    Q5_1    d f16 | m f16 | fifth bits | nibbles    d q + m
    Q8_0    d f16 | 32 int8                         d q
    IQ4_NL  d f16 | nibbles                         d T[q]
    MXFP4   e u8  | nibbles                         2^(e - 127) E2M1[q]

A block's first 16 elements are the low nibbles of its bytes, the other 16 the high ones. Q4_0 and Q8_0 are int4 and
scaled8 in groups of 32 and become those; the others keep their bytes and get a layout of their own. The CPU backend's
panels are made of what `Split` takes a block apart into.

Types: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; values and order of arithmetic as the `gguf`
package's `dequantize`, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from amalgam.checkpoint.gguf import BLOCK_TYPES, BlockType
from amalgam.errors import CheckpointError
from amalgam.formats.contract import WEIGHT_SUFFIX, ModuleContext, Read, StoredWeight, WeightFormat
from amalgam.formats.fused import TensorPart
from amalgam.formats.grid import QuantizeOptions
from amalgam.kernels.layouts import (
    INT4,
    PANELS_INT4,
    PANELS_INT5,
    PANELS_TABLE4,
    SCALED8,
    pack_nibbles,
)
from amalgam.kernels.weights import Layout, PackedWeight

Decode = Callable[[Tensor], Tensor]
# uint8 `[blocks, bytes of a block]` → `[blocks, …]` by the names that panels have for them: codes as weight, a byte
# each; scale and minimum in their stored type, one each; int8 of parts; a table, which all share.
Split = Callable[[Tensor], dict[str, Tensor]]
TYPES = {block.name: block for block in BLOCK_TYPES.values()}
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Doubled E2M1 values; the scale is halved instead, as ggml has it: 2^-128, the least, is no normal float32.
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class GgufFormat(WeightFormat):
    """One ggml type, kept as it is stored.

    Args:
        type_name: as ggml calls it.
        decode: uint8 `[blocks, bytes of a block]` → float32 `[blocks, elements of a block]`.
        halves: byte offsets of a block's f16 fields.
        split, panels: what a block consists of, and the panels that are made of it.
    """

    _layout: Layout | None = None

    def __init__(
        self,
        type_name: str,
        decode: Decode,
        halves: tuple[int, ...],
        split: Split | None = None,
        panels: Layout | None = None,
    ) -> None:
        self.type: BlockType = TYPES[type_name]
        self.name = f"gguf_{type_name.lower()}"
        self._decode = decode
        self.halves = halves
        self._split = split
        own = Layout(
            self.name,
            self._unpack,
            has_rows=True,
            panels={} if panels is None else {torch.uint8: panels},
            split=None if split is None else self._parts,
        )
        self.layouts = (self._layout or own,)

    def recognise(self, name: str, parts: Mapping[str, TensorPart], context: ModuleContext) -> StoredWeight | None:
        entry = parts[WEIGHT_SUFFIX]
        if entry.encoding != self.type.name:
            return None
        shape = self.type.logical_shape(entry.shape)
        if len(shape) != 2:
            raise CheckpointError(
                f"Tensor {entry.name!r} of weight {name!r} has type {self.type.name} and shape {list(shape)} "
                f"in {entry.file.name}.",
                remedy="Only matrices can be quantized.",
            )
        return StoredWeight(name, self, shape, parts, (1, self.type.num_elements))

    def lines(self, stored: StoredWeight, role: str) -> int | None:
        return 1

    def load(self, stored: StoredWeight, read: Read) -> PackedWeight:
        entry = stored.parts[WEIGHT_SUFFIX]
        raw = read(entry)
        self.check_finite(stored.name, entry, raw)
        return self.pack_blocks(raw, stored.shape)

    def check_finite(self, name: str, entry: TensorPart, raw: Tensor) -> None:
        """Raise CheckpointError if a tensor of this type has a scale that is no number."""
        if not self._is_finite(raw.reshape(-1, self.type.num_bytes)):
            raise CheckpointError(
                f"Tensor {entry.name!r} of weight {name!r} has a scale that is NaN or infinite in {entry.file.name}.",
                remedy="The file is damaged: download it again.",
            )

    def expand(self, raw: Tensor) -> Tensor:
        """Stored bytes of any rank → float32."""
        return self._decode(raw.reshape(-1, self.type.num_bytes)).view(self.type.logical_shape(tuple(raw.shape)))

    def nbytes(self, shape: tuple[int, ...], options: QuantizeOptions = QuantizeOptions()) -> int:
        return math.prod(shape) // self.type.num_elements * self.type.num_bytes

    def _is_finite(self, blocks: Tensor) -> bool:
        return all(bool(torch.isfinite(half(blocks, offset)).all()) for offset in self.halves)

    def pack_blocks(self, raw: Tensor, shape: tuple[int, ...]) -> PackedWeight:
        """Stored bytes `[out, …]` as a weight of a shape."""
        return PackedWeight(self.layouts[0], shape, {"weight": raw.clone()}, (1, self.type.num_elements))

    def _unpack(self, weight: PackedWeight) -> Tensor:
        return self.expand(weight.parts["weight"])

    def _parts(self, weight: PackedWeight) -> dict[str, Tensor]:
        """What the weight consists of: `[out, …]` each but the table."""
        assert self._split is not None
        parts = self._split(weight.parts["weight"].reshape(-1, self.type.num_bytes))
        return {name: part if name == "table" else part.reshape(weight.shape[0], -1) for name, part in parts.items()}


class _Q4_0(GgufFormat):  # noqa: N801 - ggml's name
    """As int4 in groups of 32 with f16 scales and the zero at 8: the same product in float32."""

    _layout = INT4

    def pack_blocks(self, raw: Tensor, shape: tuple[int, ...]) -> PackedWeight:
        blocks = raw.view(shape[0], -1, self.type.num_bytes)
        parts = {
            "weight": pack_nibbles(nibbles(blocks[..., 2:])).flatten(1),
            "scale": blocks[..., :2].contiguous().view(torch.float16).squeeze(-1),
        }
        return PackedWeight(INT4, shape, parts, (1, self.type.num_elements))


class _Q8_0(GgufFormat):  # noqa: N801
    """As int8 in groups of 32 with f16 scales: the same product in float32."""

    _layout = SCALED8

    def pack_blocks(self, raw: Tensor, shape: tuple[int, ...]) -> PackedWeight:
        blocks = raw.view(shape[0], -1, self.type.num_bytes)
        parts = {
            "weight": blocks[..., 2:].contiguous().view(torch.int8).flatten(1),
            "scale": blocks[..., :2].contiguous().view(torch.float16).squeeze(-1),
        }
        return PackedWeight(SCALED8, shape, parts, (1, self.type.num_elements))


class _Mxfp4(GgufFormat):
    """The scale's exponent 255 is NaN (OCP Microscaling 1.0)."""

    def _is_finite(self, blocks: Tensor) -> bool:
        return not bool((blocks[:, 0] == 255).any())


def stored_half(blocks: Tensor, offset: int) -> Tensor:
    """The f16 at a byte offset of every block, `[blocks, 1]`."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16)


def half(blocks: Tensor, offset: int) -> Tensor:
    """The same in float32."""
    return stored_half(blocks, offset).float()


def table(values: Iterable[float]) -> Tensor:
    """16 values as panels have them, with neither a factor nor a divisor."""
    return torch.tensor([*values, 1.0, 1.0])


def nibbles(packed: Tensor) -> Tensor:
    """uint8 `[..., n]` → uint8 `[..., 2n]`: first all low nibbles, then all high ones."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def bits(packed: Tensor, width: int) -> Tensor:
    """uint8 `[..., n]` → uint8 `[..., 8 / width, n]`: fields of `width` bits, the lowest first."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts) & ((1 << width) - 1)


def look_up(values: tuple[int, ...], index: Tensor) -> Tensor:
    """`values[index]` as float32."""
    return torch.tensor(values, dtype=torch.float32, device=index.device)[index.int()]


def _fifth_bits(blocks: Tensor, offset: int) -> Tensor:
    """Bit e of the 32 at `offset` is the fifth of element e."""
    return bits(blocks[:, offset : offset + 4], 1).transpose(-1, -2).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * (nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * nibbles(blocks[:, 4:]).float() + half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * ((nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * (nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).float() + half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * half(blocks, 0)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return half(blocks, 0) * look_up(IQ4_VALUES, nibbles(blocks[:, 2:]))


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[:, :1].int()
    # The bits of 2^(e - 128): a normal float32 from 2 on, below it a subnormal one.
    pattern = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return pattern.view(torch.float32) * look_up(_E2M1_DOUBLED, nibbles(blocks[:, 1:]))


def _split_q4_1(blocks: Tensor) -> dict[str, Tensor]:
    codes = pack_nibbles(nibbles(blocks[:, 4:]))
    return {"weight": codes, "scale": stored_half(blocks, 0), "minimum": stored_half(blocks, 2)}


def _split_q5_0(blocks: Tensor) -> dict[str, Tensor]:
    return {"weight": nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), "scale": stored_half(blocks, 0)}


def _split_q5_1(blocks: Tensor) -> dict[str, Tensor]:
    codes = nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return {"weight": codes, "scale": stored_half(blocks, 0), "minimum": stored_half(blocks, 2)}


def _split_iq4_nl(blocks: Tensor) -> dict[str, Tensor]:
    return {"weight": nibbles(blocks[:, 2:]), "scale": stored_half(blocks, 0), "table": table(IQ4_VALUES)}


def _split_mxfp4(blocks: Tensor) -> dict[str, Tensor]:
    scale = blocks[:, :1].contiguous().view(torch.float8_e8m0fnu)
    values = (value / 2 for value in _E2M1_DOUBLED)
    return {"weight": nibbles(blocks[:, 1:]), "scale": scale, "table": table(values)}


FORMATS = (
    _Q4_0("Q4_0", _q4_0, (0,)),
    GgufFormat("Q4_1", _q4_1, (0, 2), _split_q4_1, PANELS_INT4),
    GgufFormat("Q5_0", _q5_0, (0,), _split_q5_0, PANELS_INT5),
    GgufFormat("Q5_1", _q5_1, (0, 2), _split_q5_1, PANELS_INT5),
    _Q8_0("Q8_0", _q8_0, (0,)),
    GgufFormat("IQ4_NL", _iq4_nl, (0,), _split_iq4_nl, PANELS_TABLE4),
    _Mxfp4("MXFP4", _mxfp4, (), _split_mxfp4, PANELS_TABLE4),
)
