"""Values → the blocks of ggml's types, each rounded by itself.

In: float32 matrices. Out: their rows as bytes. Must never know: which weight it is, how it was stored before.

The rules are ggml's `quantize_row_*_ref` (https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c): a block of
32 keeps its largest magnitude, or its least and largest value. K-quants look for the scale, or scale and minimum, of
each part of 16 or 32 that leaves the least weighted error, round those to the super-block's, and then the values to
what that gives. (Q3_K's parts are searched like Q6_K's.) The drawings of the blocks are in `blocks` and `k_quants`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from amalgam.formats.gguf.blocks import TYPES

_CHUNK = 2**21  # values at a time: the search makes some ten copies of them
_TINY = 1e-15


def round_to(values: Tensor, kind: str) -> Tensor:
    """A matrix `[out, in]` in a type whose blocks divide its rows → uint8 `[out, bytes of a row]`."""
    block, rounds = TYPES[kind], _ROUNDERS[kind]
    blocks = values.float().reshape(-1, block.num_elements)
    step = _CHUNK // block.num_elements
    chunks = [rounds(blocks[start : start + step]) for start in range(0, len(blocks), step)]
    return torch.cat(chunks).view(values.shape[0], -1)


def join_nibbles(codes: Tensor) -> Tensor:
    """uint8 `[..., 2n]` below 16 → `[..., n]`: the first half in the low nibbles, the other in the high ones."""
    low, high = codes.chunk(2, dim=-1)
    return low | (high << 4)


def join_bits(fields: Tensor, width: int) -> Tensor:
    """uint8 `[..., 8 / width, n]` → `[..., n]`: fields of `width` bits, the lowest first."""
    joined = torch.zeros_like(fields[..., 0, :])
    for index in range(8 // width):
        joined |= fields[..., index, :] << (index * width)
    return joined


def fifth_bits(codes: Tensor) -> Tensor:
    """uint8 `[blocks, 32]` → `[blocks, 4]`: bit e of them is the fifth of element e."""
    return join_bits((codes >> 4).view(-1, 4, 8).transpose(-1, -2), 1)


def half_bytes(values: Tensor) -> Tensor:
    """`[blocks]` → uint8 `[blocks, 2]`, as float16."""
    return values.to(torch.float16).view(-1, 1).contiguous().view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 0.0, 1.0 / scale)


def _codes(scaled: Tensor, low: int, high: int) -> Tensor:
    return scaled.round().clamp_(low, high)


# --- Blocks of 32 ---


def _extreme(values: Tensor) -> Tensor:
    """The value of the largest magnitude in each row, `[rows]`."""
    return values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)


def _symmetric(values: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales, and codes from 0 whose middle means 0; the extreme value gets the least code."""
    scale = _extreme(values) / -levels
    codes = (values * _inverse(scale).unsqueeze(-1) + levels + 0.5).floor_().clamp_(0, 2 * levels - 1)
    return scale, codes.to(torch.uint8)


def _affine(values: Tensor, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scales, minima and codes."""
    least = values.amin(-1)
    scale = (values.amax(-1) - least) / high
    codes = ((values - least.unsqueeze(-1)) * _inverse(scale).unsqueeze(-1) + 0.5).floor_().clamp_(0, high)
    return scale, least, codes.to(torch.uint8)


def _q4_0(values: Tensor) -> Tensor:
    scale, codes = _symmetric(values, 8)
    return torch.cat((half_bytes(scale), join_nibbles(codes)), -1)


def _q4_1(values: Tensor) -> Tensor:
    scale, least, codes = _affine(values, 15)
    return torch.cat((half_bytes(scale), half_bytes(least), join_nibbles(codes)), -1)


def _q5_0(values: Tensor) -> Tensor:
    scale, codes = _symmetric(values, 16)
    return torch.cat((half_bytes(scale), fifth_bits(codes), join_nibbles(codes & 15)), -1)


def _q5_1(values: Tensor) -> Tensor:
    scale, least, codes = _affine(values, 31)
    return torch.cat((half_bytes(scale), half_bytes(least), fifth_bits(codes), join_nibbles(codes & 15)), -1)


def _q8_0(values: Tensor) -> Tensor:
    scale = values.abs().amax(-1) / 127
    codes = _codes(values * _inverse(scale).unsqueeze(-1), -127, 127).to(torch.int8)
    return torch.cat((half_bytes(scale), codes.view(torch.uint8)), -1)


# --- Super-blocks of 256 ---


def _best_scale(values: Tensor, levels: int) -> Tensor:
    """Scales `[..., parts]` of `[..., parts, n]`, codes within ±levels, large values weighing more."""
    extreme = _extreme(values.flatten(0, -2)).view(values.shape[:-1])
    weight = values * values
    best = found = torch.zeros_like(extreme)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(levels + 0.1 * step) * _inverse(extreme)
        codes = _codes(values * inverse.unsqueeze(-1), -levels, levels - 1)
        product, square = (weight * values * codes).sum(-1), (weight * codes * codes).sum(-1)
        gain = torch.where(square > 0, product * product / square, 0.0)
        is_better = gain > best
        best = torch.where(is_better, gain, best)
        found = torch.where(is_better, product / square, found)
    return found.masked_fill(extreme.abs() < _TINY, 0.0)


def _best_affine(
    values: Tensor, weight: Tensor, high: int, start: float, num_steps: int, is_absolute: bool
) -> tuple[Tensor, Tensor]:
    """Scales and what is subtracted, neither below 0, `[..., parts]` each."""
    least, largest = values.amin(-1).clamp(max=0), values.amax(-1)
    span = largest - least
    total, first = weight.sum(-1), (weight * values).sum(-1)
    scale, minimum = span / high, least

    def error(codes: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        difference = scale.unsqueeze(-1) * codes + minimum.unsqueeze(-1) - values
        return (weight * (difference.abs() if is_absolute else difference * difference)).sum(-1)

    def codes_at(inverse: Tensor) -> Tensor:
        return _codes((values - least.unsqueeze(-1)) * inverse.unsqueeze(-1), 0, high)

    best = error(codes_at(_inverse(scale)), scale, minimum)
    for step in range(num_steps + 1):
        codes = codes_at((start + 0.1 * step + high) * _inverse(span))
        weighted = weight * codes
        one, two, cross = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * values).sum(-1)
        determinant = total * two - one * one
        is_regular = determinant > 0
        divisor = torch.where(is_regular, determinant, 1.0)
        new_scale, new_minimum = (total * cross - first * one) / divisor, (two * first - one * cross) / divisor
        is_above = new_minimum > 0
        new_scale = torch.where(is_above, cross / two.clamp(min=_TINY), new_scale)
        new_minimum = new_minimum.clamp(max=0)
        found = error(codes, new_scale, new_minimum)
        is_better = is_regular & (found < best)
        best = torch.where(is_better, found, best)
        scale = torch.where(is_better, new_scale, scale)
        minimum = torch.where(is_better, new_minimum, minimum)
    is_flat = span <= 0
    return scale.masked_fill(is_flat, 0.0), -minimum


def _shared(parts: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Numbers ≥ 0 of parts `[blocks, parts]` → the super-block's float16 scale in float32, codes uint8."""
    largest = parts.amax(-1)
    codes = _codes(parts * (levels * _inverse(largest)).unsqueeze(-1), 0, levels).to(torch.uint8)
    return (largest / levels).to(torch.float16).float(), codes


def _signed_shared(parts: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """The same for scales of either sign: codes float32 from -levels to levels - 1."""
    extreme = _extreme(parts)
    inverse = -levels * _inverse(extreme)
    codes = _codes(parts * inverse.unsqueeze(-1), -levels, levels - 1)
    return _inverse(inverse).to(torch.float16).float(), codes


def _affine_codes(
    values: Tensor, high: int, levels: int, start: float, num_steps: int, weight: Tensor, is_absolute: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of `[blocks, parts, n]`: d, dmin `[blocks]`; the parts' scales and minima; codes uint8 `[blocks, parts, n]`."""
    scales, minima = _best_affine(values, weight, high, start, num_steps, is_absolute)
    d, scale_codes = _shared(scales, levels)
    dmin, minimum_codes = _shared(minima, levels)
    scale = (d.unsqueeze(-1) * scale_codes.float()).unsqueeze(-1)
    minimum = (dmin.unsqueeze(-1) * minimum_codes.float()).unsqueeze(-1)
    codes = _codes((values + minimum) * _inverse(scale), 0, high).to(torch.uint8)
    return d, dmin, scale_codes, minimum_codes, codes


def _q2_k(values: Tensor) -> Tensor:
    parts = values.view(-1, 16, 16)
    d, dmin, scales, minima, codes = _affine_codes(parts, 3, 15, -0.5, 15, parts.abs(), is_absolute=True)
    packed = join_bits(codes.view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat((scales | (minima << 4), packed, half_bytes(d), half_bytes(dmin)), -1)


def _q3_k(values: Tensor) -> Tensor:
    parts = values.view(-1, 16, 16)
    d, scales = _signed_shared(_best_scale(parts, 4), 32)
    scale = (d.unsqueeze(-1) * scales).unsqueeze(-1)
    codes = (_codes(parts * _inverse(scale), -4, 3) + 4).to(torch.uint8).view(-1, 256)
    stored = (scales + 32).to(torch.uint8)
    low, high = join_nibbles(stored & 15), join_bits((stored >> 4).view(-1, 4, 4), 2)
    packed = join_bits((codes & 3).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat((join_bits((codes >> 2).view(-1, 8, 32), 1), packed, low, high, half_bytes(d)), -1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight 6-bit scales and eight 6-bit minima in 12 bytes; `k_quants._scales_and_minima` takes them apart."""
    (low, high), (least, greatest) = scales.chunk(2, -1), minima.chunk(2, -1)
    upper = (high & 15) | ((greatest & 15) << 4)
    return torch.cat((low | ((high >> 4) << 6), least | ((greatest >> 4) << 6), upper), -1)


def _affine_k(values: Tensor, high: int, start: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """What Q4_K and Q5_K begin with, and their codes `[blocks, 8, 32]`."""
    parts = values.view(-1, 8, 32)
    weight = parts.square().mean(-1, keepdim=True).sqrt() + parts.abs()
    d, dmin, scales, minima, codes = _affine_codes(parts, high, 63, start, num_steps, weight, is_absolute=False)
    return torch.cat((half_bytes(d), half_bytes(dmin), _six_bits(scales, minima)), -1), codes


def _q4_k(values: Tensor) -> Tensor:
    head, codes = _affine_k(values, 15, -1.0, 20)
    return torch.cat((head, join_nibbles(codes.reshape(-1, 4, 64)).flatten(1)), -1)


def _q5_k(values: Tensor) -> Tensor:
    head, codes = _affine_k(values, 31, -0.5, 15)
    return torch.cat((head, join_bits(codes >> 4, 1), join_nibbles((codes & 15).reshape(-1, 4, 64)).flatten(1)), -1)


def _q6_k(values: Tensor) -> Tensor:
    parts = values.view(-1, 16, 16)
    d, scales = _signed_shared(_best_scale(parts, 32), 128)
    scale = (d.unsqueeze(-1) * scales).unsqueeze(-1)
    codes = (_codes(parts * _inverse(scale), -32, 31) + 32).to(torch.uint8)
    low = join_nibbles((codes & 15).view(-1, 2, 128)).flatten(1)
    high = join_bits((codes >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat((low, high, scales.to(torch.int8).view(torch.uint8), half_bytes(d)), -1)


_ROUNDERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
ROUNDED = tuple(_ROUNDERS)
