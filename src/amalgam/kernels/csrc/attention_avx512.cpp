#include "simd_avx512.h"

// See attention_portable.cpp for what each function means.
namespace amalgam {
namespace {

constexpr int kAccumulators = 16;
constexpr bool kFusesPacking = true;

inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float highest_lane(Floats v) { return _mm512_reduce_max_ps(v); }
inline Floats keep_range(Floats v, int first, int end) {
    const uint32_t mask = ((1u << end) - 1) & ~((1u << first) - 1);
    const Floats nothing = _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(0xff800000)));
    return _mm512_mask_mov_ps(nothing, static_cast<__mmask16>(mask), v);
}
inline Floats scale_exponent(Floats v, Floats exponent) {
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(v), _mm512_slli_epi32(_mm512_castps_si512(exponent), 23)));
}
inline Floats zero_below(Floats v, Floats x, float limit) {
    const __mmask16 keeps = _mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ);
    return _mm512_maskz_mov_ps(keeps, v);
}
inline Floats store_bfloat16(float* out, Floats v) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out), rounded);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}

inline void set_line(__m512* line, __m512d v) { *line = _mm512_castpd_ps(v); }
inline void set_line(__m512i* line, __m512d v) { *line = _mm512_castpd_si512(v); }

// Loads 4 words of 4 rows each, so that only the last two of the usual four rounds of exchanges are left.
template <class Row, class Line>
inline void transpose_four(Row&& row, Line* line) {
    __m512 part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        part[i] = _mm512_castps128_ps512(_mm_loadu_ps(row(i)));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x00f0, _mm_loadu_ps(row(i + 4)));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0x0f00, _mm_loadu_ps(row(i + 8)));
        part[i] = _mm512_mask_broadcast_f32x4(part[i], 0xf000, _mm_loadu_ps(row(i + 12)));
    }
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(part[0], part[1]));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(part[0], part[1]));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(part[2], part[3]));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(part[2], part[3]));
    set_line(line + 0, _mm512_unpacklo_pd(low01, low23));
    set_line(line + 1, _mm512_unpackhi_pd(low01, low23));
    set_line(line + 2, _mm512_unpacklo_pd(high01, high23));
    set_line(line + 3, _mm512_unpackhi_pd(high01, high23));
}

inline void transpose(const float* const* rows, float* out, int64_t stride) {
#pragma GCC unroll 4
    for (int word = 0; word < 16; word += 4) {
        Floats line[4];
        transpose_four([&](int row) { return rows[row] + word; }, line);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) store_floats(out + (word + i) * stride, line[i]);
    }
}

alignas(64) constexpr uint16_t kFirstHalf[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// 32 pairs.
inline void interleave_two(const uint16_t* a, const uint16_t* b, Pairs* line) {
    const __m512i first = _mm512_load_si512(kFirstHalf);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    const __m512i low = _mm512_loadu_si512(a), high = _mm512_loadu_si512(b);
    line[0] = _mm512_permutex2var_epi16(low, first, high);
    line[1] = _mm512_permutex2var_epi16(low, second, high);
}

inline void interleave_pairs(const uint16_t* a, const uint16_t* b, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        Pairs line[2];
        interleave_two(a + i, b + i, line);
        _mm512_store_si512(out + i, line[0]);
        _mm512_store_si512(out + i + 16, line[1]);
    }
    if (i < count) {
        const auto words = [&](const uint16_t* p) {
            return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i)));
        };
        _mm512_store_si512(out + i, _mm512_or_si512(words(a), _mm512_slli_epi32(words(b), 16)));
    }
}

}  // namespace
}  // namespace amalgam

#include "attention_kernels.h"

namespace amalgam {

const AttentionKernels kAvx512Attention = {"avx512", attention_scratch, attend, merge_attention};

}  // namespace amalgam
