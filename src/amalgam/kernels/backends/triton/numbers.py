"""Codes of four and eight bits as the numbers that they stand for.

In: uint8. Out: float32. Must never know: weights, layouts.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of every launch: products and sums in one instruction where both are needed. Triton 3.9 warns that the default, which
# this is, will be another one.
OPTIONS = {"enable_fp_fusion": True}


@triton.jit
def e4m3(codes):
    """Bits of float8_e4m3fn, uint8, as float32; for cards without an instruction that does it."""
    magnitude = ((codes & 0x7F).to(tl.uint32) << 20).to(tl.float32, bitcast=True)
    # The exponent of float32 counts from 127, the one of e4m3 from 7. Subnormals are subnormals before and none behind.
    value = magnitude * 1.329227995784916e36  # 2^120
    value = tl.where((codes & 0x7F) == 0x7F, float("nan"), value)
    return tl.where(codes >= 128, -value, value)


@triton.jit
def e8m0(codes):
    """Bits of float8_e8m0fnu, uint8, as float32: 2^(code - 127)."""
    value = (codes.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    value = tl.where(codes == 0, 5.877471754111438e-39, value)  # 2^-127
    return tl.where(codes == 255, float("nan"), value)


@triton.jit
def e2m1(codes):
    """Nibbles, uint8, as the values of OCP E2M1 in float32."""
    # Twice the magnitudes of 0, ½, 1, 1½, 2, 3, 4 and 6, four bits each.
    doubled = (0xC8643210 >> ((codes & 7).to(tl.uint32) * 4)) & 15
    value = doubled.to(tl.float32) * 0.5
    return tl.where(codes >= 8, -value, value)
