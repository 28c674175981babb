"""GGUF's K-quants and IQ4_XS: super-blocks of 256 neighbours of a row, whose sub-blocks have quantized scales.

    Q2_K    scales[16] | q[64] | d | dmin            16 sub-blocks: d (s & 15) q - dmin (s >> 4)
    Q3_K    high[32] | q[64] | scales[12] | d        16: d (s - 32) (q - 4, unless its high bit is set)
    Q4_K    d | dmin | scales[12] | q[128]           8: d s q - dmin m
    Q5_K    d | dmin | scales[12] | high[32] | q[128]
    Q6_K    q[128] | high[64] | scales int8[16] | d  16: d s (q - 32)
    IQ4_XS  d | high scales u16 | low scales[4] | q[128]   8: d (s - 32) T[q]

d and dmin are f16. Types: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; values and order of
arithmetic as the `gguf` package's `dequantize`, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from amalgam.formats.gguf.blocks import IQ4_VALUES, GgufFormat, bits, half, look_up, nibbles

_SUPER = 256


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    # 2 × 32 bytes; the four fields of a byte are 32 elements apart.
    q = bits(blocks[:, 16:80].view(-1, 2, 32), 2).reshape(-1, 16, 16)
    scale = (half(blocks, 80) * (scales & 15).float()).unsqueeze(-1)
    least = (half(blocks, 82) * (scales >> 4).float()).unsqueeze(-1)
    return (scale * q.float() - least).view(-1, _SUPER)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    low = nibbles(packed[:, :8])
    high = bits(packed[:, 8:], 2).flatten(1)
    scales = (low | (high << 4)).float() - 32
    q = bits(blocks[:, 32:96].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    high_bit = bits(blocks[:, :32], 1).reshape(-1, 16, 16)
    values = q.float() - 4 * (1 - high_bit.float())
    return ((half(blocks, 108) * scales).unsqueeze(-1) * values).view(-1, _SUPER)


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """12 bytes → eight 6-bit scales and eight 6-bit minima, float32 `[blocks, 8]` each.

    Four low scales (their two high bits belong to the upper four), four low minima (likewise), and four bytes with
    the low nibbles of the upper scales and the high nibbles of the upper minima.
    """
    scale, least, upper = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((scale & 63, (upper & 15) | ((scale >> 2) & 48)), dim=-1)
    minima = torch.cat((least & 63, (upper >> 4) | ((least >> 2) & 48)), dim=-1)
    return scales.float(), minima.float()


def _affine(blocks: Tensor, q: Tensor) -> Tensor:
    """Q4_K and Q5_K from their values, `[blocks, 8, 32]`."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    scale = (half(blocks, 0) * scales).unsqueeze(-1)
    least = (half(blocks, 2) * minima).unsqueeze(-1)
    return (scale * q.float() - least).view(-1, _SUPER)


def _q4_k(blocks: Tensor) -> Tensor:
    return _affine(blocks, bits(blocks[:, 16:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = bits(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _affine(blocks, low | (bits(blocks[:, 16:48], 1) << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    low = bits(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 8, 32)
    high = bits(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    values = ((low | (high << 4)).float() - 32).view(-1, 16, 16)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return ((half(blocks, 208) * scales).unsqueeze(-1) * values).view(-1, _SUPER)


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = bits(blocks[:, 4:8], 4).transpose(-1, -2).flatten(1)
    high = bits(blocks[:, 2:4], 2).transpose(-1, -2).flatten(1)
    scales = (low | (high << 4)).float() - 32
    values = look_up(IQ4_VALUES, nibbles(blocks[:, 8:].reshape(-1, 8, 16)))
    return ((half(blocks, 0) * scales).unsqueeze(-1) * values).view(-1, _SUPER)


FORMATS = (
    GgufFormat("Q2_K", _q2_k, (80, 82)),
    GgufFormat("Q3_K", _q3_k, (108,)),
    GgufFormat("Q4_K", _q4_k, (0, 2)),
    GgufFormat("Q5_K", _q5_k, (0, 2)),
    GgufFormat("Q6_K", _q6_k, (208,)),
    GgufFormat("IQ4_XS", _iq4_xs, (0,)),
)
