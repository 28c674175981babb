// What AVX-512 with VNNI and BF16 has, for avx512.h and amx.h.
#pragma once

#include "isa/avx512_lines.h"

namespace amalgam {
namespace {

inline Floats dot_pairs(Floats sum, Pairs w, Operand4 x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }

inline Floats store_bfloat16(float* out, Floats v) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), rounded);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}

}  // namespace
}  // namespace amalgam
