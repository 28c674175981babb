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

from amalgam.formats.gguf.blocks import IQ4_VALUES, GgufFormat, Split, bits, look_up, nibbles, stored_half, table
from amalgam.kernels.layouts import PANELS_K2, PANELS_K3, PANELS_K4, PANELS_K5, PANELS_K6, PANELS_K_TABLE4
from amalgam.kernels.weights import Layout

_SUPER = 256


def _split_q2_k(blocks: Tensor) -> dict[str, Tensor]:
    scales = blocks[:, :16]
    return {
        # 2 × 32 bytes; the four fields of a byte are 32 elements apart.
        "weight": bits(blocks[:, 16:80].view(-1, 2, 32), 2).flatten(1),
        "scale": stored_half(blocks, 80),
        "minimum": stored_half(blocks, 82),
        "part_scale": (scales & 15).view(torch.int8),
        "part_minimum": (scales >> 4).view(torch.int8),
    }


def _split_q3_k(blocks: Tensor) -> dict[str, Tensor]:
    packed = blocks[:, 96:108]
    scales = nibbles(packed[:, :8]) | (bits(packed[:, 8:], 2).flatten(1) << 4)
    low = bits(blocks[:, 32:96].reshape(-1, 2, 32), 2).flatten(1)
    high = bits(blocks[:, :32], 1).flatten(1)
    return {
        "weight": low | (high << 2),
        "scale": stored_half(blocks, 108),
        "part_scale": scales.view(torch.int8) - 32,
    }


def _scales_and_minima(packed: Tensor) -> dict[str, Tensor]:
    """12 bytes → eight 6-bit scales and eight 6-bit minima, int8 `[blocks, 8]` each.

    Four low scales (their two high bits belong to the upper four), four low minima (likewise), and four bytes with
    the low nibbles of the upper scales and the high nibbles of the upper minima.
    """
    scale, least, upper = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((scale & 63, (upper & 15) | ((scale >> 2) & 48)), dim=-1)
    minima = torch.cat((least & 63, (upper >> 4) | ((least >> 2) & 48)), dim=-1)
    return {"part_scale": scales.view(torch.int8), "part_minimum": minima.view(torch.int8)}


def _split_affine(blocks: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Q4_K and Q5_K from their values."""
    halves = {"scale": stored_half(blocks, 0), "minimum": stored_half(blocks, 2)}
    return {"weight": codes.flatten(1), **halves, **_scales_and_minima(blocks[:, 4:16])}


def _split_q4_k(blocks: Tensor) -> dict[str, Tensor]:
    return _split_affine(blocks, bits(blocks[:, 16:].reshape(-1, 4, 32), 4))


def _split_q5_k(blocks: Tensor) -> dict[str, Tensor]:
    low = bits(blocks[:, 48:].reshape(-1, 4, 32), 4).reshape(-1, 8, 32)
    return _split_affine(blocks, low | (bits(blocks[:, 16:48], 1) << 4))


def _split_q6_k(blocks: Tensor) -> dict[str, Tensor]:
    low = bits(blocks[:, :128].reshape(-1, 2, 64), 4).reshape(-1, 8, 32)
    high = bits(blocks[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 8, 32)
    return {
        "weight": (low | (high << 4)).flatten(1),
        "scale": stored_half(blocks, 208),
        "part_scale": blocks[:, 192:208].contiguous().view(torch.int8),
    }


def _split_iq4_xs(blocks: Tensor) -> dict[str, Tensor]:
    low = bits(blocks[:, 4:8], 4).transpose(-1, -2).flatten(1)
    high = bits(blocks[:, 2:4], 2).transpose(-1, -2).flatten(1)
    return {
        "weight": nibbles(blocks[:, 8:].reshape(-1, 8, 16)).flatten(1),
        "scale": stored_half(blocks, 0),
        "part_scale": (low | (high << 4)).view(torch.int8) - 32,
        "table": table(IQ4_VALUES),
    }


def _values(parts: dict[str, Tensor], zero: int) -> Tensor:
    """`scale × part scale × (code - zero) - minimum × part minimum`; codes look up the table where there is one."""
    part_scale = parts["part_scale"].float()
    codes = parts["weight"].view(*part_scale.shape, -1)
    values = look_up(IQ4_VALUES, codes) if "table" in parts else codes.float() - zero
    values = (parts["scale"].float() * part_scale).unsqueeze(-1) * values
    if "minimum" in parts:
        values = values - (parts["minimum"].float() * parts["part_minimum"].float()).unsqueeze(-1)
    return values.view(-1, _SUPER)


def _format(type_name: str, split: Split, halves: tuple[int, ...], panels: Layout, zero: int = 0) -> GgufFormat:
    return GgufFormat(type_name, lambda blocks: _values(split(blocks), zero), halves, split, panels)


FORMATS = (
    _format("Q2_K", _split_q2_k, (80, 82), PANELS_K2),
    _format("Q3_K", _split_q3_k, (108,), PANELS_K3, 4),
    _format("Q4_K", _split_q4_k, (0, 2), PANELS_K4),
    _format("Q5_K", _split_q5_k, (0, 2), PANELS_K5),
    _format("Q6_K", _split_q6_k, (208,), PANELS_K6, 32),
    _format("IQ4_XS", _split_iq4_xs, (0,), PANELS_K_TABLE4),
)
