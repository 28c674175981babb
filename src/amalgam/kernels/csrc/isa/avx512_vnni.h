// AVX-512 with VNNI and without BF16: Intel's Cascade Lake and Ice Lake.
#pragma once

#include "isa/avx512_lines.h"

namespace amalgam {
namespace {

constexpr int64_t kMinWideRows = 9, kMinWidePartsRows = 16;

inline Floats first_of_pairs(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline Floats second_of_pairs(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
inline Floats dot_pairs(Floats sum, Pairs w, Operand4 x) {
    sum = _mm512_fmadd_ps(second_of_pairs(w), second_of_pairs(x), sum);
    return _mm512_fmadd_ps(first_of_pairs(w), first_of_pairs(x), sum);
}

inline Floats store_bfloat16(float* out, Floats v) {
    const __m512i rounded = rounded_high(v);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
    return second_of_pairs(rounded);
}

}  // namespace
}  // namespace amalgam
