#include "simd_avx2.h"

// See attention_portable.cpp for what each function means.
namespace amalgam {
namespace {

constexpr int kAccumulators = 4;
constexpr bool kFusesPacking = false;

inline Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats subtract(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats fused(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats maximum(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline float highest_lane(Floats v) {
    const __m256 eight = _mm256_max_ps(v.a, v.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline Floats keep_range(Floats v, int first, int end) {
    const __m256 nothing = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xff800000)));
    const auto half = [&](__m256 x, __m256i lane) {
        const __m256i is_outside = _mm256_or_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                                                   _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(end - 1)));
        return _mm256_blendv_ps(x, nothing, _mm256_castsi256_ps(is_outside));
    };
    return {half(v.a, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            half(v.b, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
inline Floats scale_exponent(Floats v, Floats exponent) {
    const auto half = [](__m256 x, __m256 e) {
        return _mm256_castsi256_ps(
            _mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_castps_si256(e), 23)));
    };
    return {half(v.a, exponent.a), half(v.b, exponent.b)};
}
inline Floats zero_below(Floats v, Floats x, float limit) {
    const __m256 bound = _mm256_set1_ps(limit);
    return {_mm256_and_ps(v.a, _mm256_cmp_ps(x.a, bound, _CMP_NLT_UQ)),
            _mm256_and_ps(v.b, _mm256_cmp_ps(x.b, bound, _CMP_NLT_UQ))};
}
inline Floats store_bfloat16(float* out, Floats v) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    const auto round = [&](__m256 x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
        const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
        const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
        return _mm256_and_si256(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan)), high);
    };
    const __m256i a = round(v.a), b = round(v.b);
    const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute4x64_epi64(packed, 0xd8));
    return {_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)};
}

inline void transpose(const float* const* rows, float* out, int64_t stride) {
    for (int half = 0; half < 2; ++half, rows += 8, out += 8) {
#pragma GCC unroll 4
        for (int quarter = 0; quarter < 4; ++quarter) {
            __m256 part[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                part[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows[i] + 4 * quarter)),
                                               _mm_loadu_ps(rows[i + 4] + 4 * quarter), 1);
            }
            const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(part[0], part[1]));
            const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(part[0], part[1]));
            const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(part[2], part[3]));
            const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(part[2], part[3]));
            float* to = out + 4 * quarter * stride;
            _mm256_store_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
            _mm256_store_ps(to + stride, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
            _mm256_store_ps(to + 2 * stride, _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)));
            _mm256_store_ps(to + 3 * stride, _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)));
        }
    }
}

inline void interleave_pairs(const uint16_t* a, const uint16_t* b, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += 16) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a + i));
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + i));
        const __m256i first = _mm256_unpacklo_epi16(low, high), second = _mm256_unpackhi_epi16(low, high);
        auto* to = reinterpret_cast<__m256i*>(out + i);
        _mm256_store_si256(to, _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_store_si256(to + 1, _mm256_permute2x128_si256(first, second, 0x31));
    }
}

}  // namespace
}  // namespace amalgam

#include "attention_kernels.h"

namespace amalgam {

const AttentionKernels kAvx2Attention = {"avx2", attention_scratch, attend, merge_attention};

}  // namespace amalgam
