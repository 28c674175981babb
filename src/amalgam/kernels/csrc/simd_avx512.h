// One panel line per register: AVX-512 with VNNI and BF16. See simd_portable.h for what each function means.
#pragma once

#include <immintrin.h>

#include "float_types.h"

namespace amalgam {
namespace {

constexpr int kTileRows = 8;
constexpr int kPairSums = 2;
constexpr int kDirectCodedRows = kTileRows;
constexpr int32_t kInt8Bias = 128;

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;
using Pairs = __m512i;
using Operand4 = __m512i;

inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Floats broadcast_float(const float* p) { return _mm512_set1_ps(*p); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store_floats(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints broadcast_int(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints zero_times(const uint8_t* zero, int32_t factor) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero)));
    return _mm512_mullo_epi32(wide, _mm512_set1_epi32(factor));
}
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }

inline int32_t load_word(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word;
}
inline Operand4 broadcast4(const void* p) { return _mm512_set1_epi32(load_word(p)); }

inline void load_nibbles(const uint8_t* line, Bytes& low, Bytes& high) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i v = _mm512_load_si512(line);
    low = _mm512_and_si512(v, mask);
    high = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
}
inline Bytes load_int8(const uint8_t* line) { return _mm512_load_si512(line); }
inline Ints dot_nibbles(Ints sum, Bytes w, Operand4 x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Ints dot_int8(Ints sum, Bytes w, Operand4 x) { return _mm512_dpbusd_epi32(sum, w, x); }

inline Pairs load_pairs(const uint8_t* line) { return _mm512_load_si512(line); }
inline void store_pairs(uint8_t* line, Pairs v) { _mm512_store_si512(line, v); }
inline Floats dot_pairs(Floats sum, Pairs w, Operand4 x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }

// A code in the high byte of each word → bfloat16 of its value / 256, for normal numbers: exponent and mantissa move
// into place, and what the new exponent has in addition never carries, so that an OR sets it.
inline __m512i fp8_normal(__m512i code) {
    return _mm512_ternarylogic_epi32(_mm512_srai_epi16(code, 4), _mm512_set1_epi16(static_cast<short>(0x87f0)),
                                     _mm512_set1_epi16(0x3800), 0xea);
}
// Replaces what comes from subnormal codes, by a table; low_code has the code in the low byte.
inline __m512i fp8_subnormal(__m512i value, __m512i code, __m512i low_code) {
    const __m512i table =
        _mm512_castsi128_si512(_mm_setr_epi16(0, 0x3700, 0x3780, 0x37c0, 0x3800, 0x3820, 0x3840, 0x3860));
    const __mmask32 is_subnormal = _mm512_testn_epi16_mask(code, _mm512_set1_epi16(0x7800));
    value = _mm512_mask_permutexvar_epi16(value, is_subnormal, low_code, table);
    return _mm512_ternarylogic_epi32(code, _mm512_set1_epi16(static_cast<short>(0x8000)), value, 0xea);
}
inline void load_fp8(const uint8_t* line, Pairs& first, Pairs& second) {
    const __m512i v = _mm512_load_si512(line);
    const __m512i high = _mm512_slli_epi16(v, 8);
    first = fp8_normal(high);
    second = fp8_normal(v);
    // One weight in ten thousand or so is subnormal: most lines have none.
    if (__builtin_expect(_mm512_testn_epi8_mask(v, _mm512_set1_epi8(0x78)) != 0, 0)) {
        first = fp8_subnormal(first, high, v);
        second = fp8_subnormal(second, v, _mm512_srli_epi16(v, 8));
    }
}

// What the nibbles of a coded line add to the high and low bytes of bfloat16 (coded.h).
struct Codes {
    __m512i high, low;
};
inline Codes load_codes(const uint8_t* high, const uint8_t* low) {
    const auto load = [](const uint8_t* table) {
        return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    };
    return {load(high), load(low)};
}
// Half 0 or 1 of three lines → its inputs 0, 1 and 2, 3.
inline void load_coded(const uint8_t* lines, int half, const Codes& codes, Pairs& first, Pairs& second) {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    const __m512i rest = _mm512_load_si512(lines + half * kLineBytes);
    const __m512i nibbles = _mm512_load_si512(lines + 2 * kLineBytes);
    const __m512i code = _mm512_and_si512(half == 0 ? nibbles : _mm512_srli_epi16(nibbles, 4), _mm512_set1_epi8(15));
    // (rest & sign) | exponent, (rest & ~sign) | exponent
    const __m512i high = _mm512_ternarylogic_epi32(rest, sign, _mm512_shuffle_epi8(codes.high, code), 0xea);
    const __m512i low = _mm512_ternarylogic_epi32(rest, sign, _mm512_shuffle_epi8(codes.low, code), 0xba);
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
}

inline void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
// Into the second-level cache.
inline void prefetch_far(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

}  // namespace
}  // namespace amalgam
