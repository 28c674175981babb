// One panel line per register: what AVX-512 with VNNI has, with BF16 (avx512_bf16.h) or without (avx512_vnni.h).
// portable.h says what each function means.
#pragma once

#include <immintrin.h>

#include "isa/float_types.h"
#include "isa/x86_prefetch.h"

namespace amalgam {
namespace {

constexpr int kTileRows = 8;
constexpr int kPairSums = 2;
constexpr int kWidePanels = 4;
constexpr int kDirectCodedRows = kTileRows;
constexpr int32_t kInt8Bias = 128;
constexpr int64_t kLargestPartial = 0x7fffffff;

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

inline Ints load_ints(const int32_t* p) { return _mm512_loadu_si512(p); }
inline void store_ints(int32_t* p, Ints v) { _mm512_storeu_si512(p, v); }
inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints broadcast_int(int32_t v) { return _mm512_set1_epi32(v); }
inline Ints zero_times(const uint8_t* zero, int32_t factor) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(zero)));
    return _mm512_mullo_epi32(wide, _mm512_set1_epi32(factor));
}
inline Ints times(Ints v, int32_t factor) { return _mm512_mullo_epi32(v, _mm512_set1_epi32(factor)); }
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
inline void store_bytes(uint8_t* line, Bytes v) { _mm512_store_si512(line, v); }
inline Bytes load_int8(const uint8_t* line) { return _mm512_load_si512(line); }
inline Ints dot_nibbles(Ints sum, Bytes w, Operand4 x) { return _mm512_dpbusd_epi32(sum, w, x); }
// For kWidePanels. Unsigned times signed bytes, int16 times int16. In assembly, because GCC 12 copies sums that live
// through a loop to another register and back with each product.
inline Ints dot_bytes(Ints sum, Bytes u, Bytes s) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
    return sum;
}
inline Ints dot_words(Ints sum, Pairs w, Operand4 x) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}
inline Ints add_in_place(Ints sum, Ints v) {
    asm("vpaddd %1, %0, %0" : "+v"(sum) : "v"(v));
    return sum;
}
inline Ints scaled(Ints v, Ints scale) { return _mm512_mullo_epi32(v, scale); }
inline Bytes subtract_bytes(Bytes v, int from_all) {
    return _mm512_sub_epi8(v, _mm512_set1_epi8(static_cast<char>(from_all)));
}
inline Ints add_128_times(Ints sum, Bytes s) { return dot_bytes(sum, _mm512_set1_epi8(static_cast<char>(128)), s); }
inline Ints dot_int8(Ints sum, Bytes w, Operand4 x) { return _mm512_dpbusd_epi32(sum, w, x); }

// --- Codes of fewer than 8 bits ---

inline Bytes load_bytes(const uint8_t* line) { return _mm512_load_si512(line); }
template <int kShift, int kMask>
inline Bytes field(Bytes v) {
    const __m512i mask = _mm512_set1_epi8(kMask);
    if constexpr (kShift == 0) {
        return _mm512_and_si512(v, mask);
    } else if constexpr (kShift > 0) {
        return _mm512_and_si512(_mm512_srli_epi16(v, kShift), mask);
    } else {
        return _mm512_and_si512(_mm512_slli_epi16(v, -kShift), mask);
    }
}
inline Bytes join(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
using Table = __m512i;
inline Table load_table(const int8_t* values) {
    const __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
    return _mm512_xor_si512(table, _mm512_set1_epi8(static_cast<char>(0x80)));
}
inline Bytes look_up(Table table, Bytes index) { return _mm512_shuffle_epi8(table, index); }

using Partial = Ints;
inline Partial zero_partial() { return _mm512_setzero_si512(); }
inline Partial dot_codes(Partial sum, Bytes w, Operand4 x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Partial dot_looked_up(Partial sum, Bytes w, Operand4 x) { return _mm512_dpbusd_epi32(sum, w, x); }
inline Ints add_partial(Ints sum, Partial partial) { return add(sum, partial); }

inline Pairs load_byte_pairs(const uint8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void load_nibble_pairs(const uint8_t* p, Pairs& low, Pairs& high) {
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    low = _mm512_and_si512(wide, _mm512_set1_epi16(15));
    high = _mm512_srli_epi16(wide, 4);
}
inline Ints dot_shorts(Ints sum, Pairs w, Operand4 x) { return _mm512_dpwssd_epi32(sum, w, x); }
using PartScale = Ints;
inline PartScale first_scale(Pairs pairs) { return _mm512_srai_epi32(_mm512_slli_epi32(pairs, 16), 16); }
inline PartScale second_scale(Pairs pairs) { return _mm512_srai_epi32(pairs, 16); }
inline Ints add_scaled(Ints sum, Partial partial, PartScale scale) {
    return _mm512_add_epi32(sum, _mm512_mullo_epi32(partial, scale));
}

inline Floats load_scales(const void* p, DType dtype) {
    const auto codes = [&] { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))); };
    const auto words = [&] { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
    switch (dtype) {
        case DType::kFloat32:
            return _mm512_loadu_ps(p);
        case DType::kBfloat16:
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words()), 16));
        case DType::kFloat16:
            return _mm512_cvtph_ps(words());
        case DType::kE8m0:  // 0 is 2^-127, a subnormal number
            return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(codes(), 23), _mm512_set1_epi32(0x00400000)));
        default: {  // subnormal codes become normal in the product
            const __m512i code = codes();
            const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
            const __m512i magnitude = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x7f)), 20);
            const __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(0x1p120f));
            return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
        }
    }
}

inline Floats load_halves(const void* first, const void* second, DType dtype) {
    if (dtype == DType::kFloat32) {
        const __m512d low = _mm512_castpd256_pd512(_mm256_loadu_pd(static_cast<const double*>(first)));
        return _mm512_castpd_ps(_mm512_insertf64x4(low, _mm256_loadu_pd(static_cast<const double*>(second)), 1));
    }
    const __m256i words =
        _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(first))),
                                _mm_loadu_si128(static_cast<const __m128i*>(second)), 1);
    if (dtype == DType::kFloat16) return _mm512_cvtph_ps(words);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

inline Pairs load_pairs(const uint8_t* line) { return _mm512_load_si512(line); }
inline void store_pairs(uint8_t* line, Pairs v) { _mm512_store_si512(line, v); }

template <int kByte, bool kIsSigned>
inline Ints byte_of(Bytes v) {
    if constexpr (kIsSigned) return _mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * kByte), 24);
    if constexpr (kByte == 3) return _mm512_srli_epi32(v, 24);
    return _mm512_and_si512(_mm512_srli_epi32(v, 8 * kByte), _mm512_set1_epi32(255));
}
inline Pairs join_bits(__m512i first, __m512i second) {  // the high halves of both
    const __m512i low = _mm512_set1_epi32(0xffff);
    return _mm512_ternarylogic_epi32(low, _mm512_srli_epi32(first, 16), second, 0xca);
}
inline Pairs join_exact(Floats first, Floats second) {
    return join_bits(_mm512_castps_si512(first), _mm512_castps_si512(second));
}
// Rounded to bfloat16, in the high half of each lane.
inline __m512i rounded_high(Floats v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(nearest, is_nan, _mm512_set1_epi32(0x7fc00000));
}
inline Pairs join_rounded(Floats first, Floats second) { return join_bits(rounded_high(first), rounded_high(second)); }

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

// What the nibbles of a coded line add to the high and low bytes of bfloat16 (formats/bf16_coded.h).
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

inline void load_looked_up(const uint8_t* line, int half, const Codes& codes, Pairs& first, Pairs& second) {
    const __m512i nibbles = _mm512_load_si512(line);
    const __m512i code = _mm512_and_si512(half == 0 ? nibbles : _mm512_srli_epi16(nibbles, 4), _mm512_set1_epi8(15));
    const __m512i high = _mm512_shuffle_epi8(codes.high, code), low = _mm512_shuffle_epi8(codes.low, code);
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
}

// The other way round. Thirty-two values of one row: place in the window or 0; sign and mantissa, 0 for an exception.
struct CodedRow {
    __m512i code, rest;
    __mmask32 is_exception;
};
inline CodedRow code_row(__m512i bits, __m512i window) {
    const __m512i exponent = _mm512_srli_epi16(_mm512_slli_epi16(bits, 1), 8);
    const __m512i place = _mm512_sub_epi16(exponent, window);
    const __mmask32 is_inside =
        _mm512_cmplt_epu16_mask(_mm512_sub_epi16(place, _mm512_set1_epi16(1)), _mm512_set1_epi16(15));
    const __mmask32 is_exception = ~is_inside & _mm512_test_epi16_mask(bits, _mm512_set1_epi16(0x7fff));
    const __m512i sign = _mm512_and_si512(_mm512_srli_epi16(bits, 8), _mm512_set1_epi16(0x80));
    const __m512i rest = _mm512_or_si512(sign, _mm512_and_si512(bits, _mm512_set1_epi16(0x7f)));
    return {_mm512_maskz_mov_epi16(is_inside, place), _mm512_maskz_mov_epi16(~is_exception, rest), is_exception};
}
// Bytes of four rows' eight inputs, in each quarter → inputs 0 to 3 of the rows, and 4 to 7.
inline void gather_rows(__m512i row0, __m512i row1, __m512i row2, __m512i row3, __m512i& low, __m512i& high) {
    const __m512i by_pairs =
        _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m512i first = _mm512_shuffle_epi8(_mm512_packus_epi16(row0, row1), by_pairs);
    const __m512i last = _mm512_shuffle_epi8(_mm512_packus_epi16(row2, row3), by_pairs);
    low = _mm512_unpacklo_epi32(first, last);
    high = _mm512_unpackhi_epi32(first, last);
}
inline int code_rows(const uint16_t* const* rows, int64_t count, int window, uint8_t* lines) {
    const __m512i base = _mm512_set1_epi16(static_cast<short>(window));
    __mmask32 exceptions[4] = {};
    for (int64_t i = 0; i < count; i += 32) {
        const int64_t steps = count - i < 32 ? (count - i) / 8 : 4;
        const auto wanted = static_cast<__mmask32>((uint64_t{1} << 8 * steps) - 1);
        CodedRow row[4];
        for (int r = 0; r < 4; ++r) {
            row[r] = code_row(_mm512_maskz_loadu_epi16(wanted, rows[r] + i), base);
            exceptions[r] |= row[r].is_exception;
        }
        __m512i line[3], low, high;
        gather_rows(row[0].rest, row[1].rest, row[2].rest, row[3].rest, line[0], line[1]);
        gather_rows(row[0].code, row[1].code, row[2].code, row[3].code, low, high);
        line[2] = _mm512_or_si512(low, _mm512_slli_epi16(high, 4));
        uint8_t* to = lines + i / 8 * 3 * kLineBytes;
        const auto store = [&](int64_t step, const auto& quarter) {
            if (step >= steps) return;
            for (int l = 0; l < 3; ++l) {
                auto* at = reinterpret_cast<__m128i*>(to + (3 * step + l) * kLineBytes);
                _mm_store_si128(at, quarter(line[l]));
            }
        };
        store(0, [](__m512i v) { return _mm512_extracti32x4_epi32(v, 0); });
        store(1, [](__m512i v) { return _mm512_extracti32x4_epi32(v, 1); });
        store(2, [](__m512i v) { return _mm512_extracti32x4_epi32(v, 2); });
        store(3, [](__m512i v) { return _mm512_extracti32x4_epi32(v, 3); });
    }
    int with_exceptions = 0;
    for (int r = 0; r < 4; ++r) with_exceptions |= (exceptions[r] != 0) << r;
    return with_exceptions;
}
inline int64_t count_exceptions(const uint16_t* values, int64_t count, int window) {
    const __m512i base = _mm512_set1_epi16(static_cast<short>(window));
    int64_t exceptions = 0;
    for (int64_t i = 0; i < count; i += 32) {
        const int64_t left = count - i < 32 ? count - i : 32;
        const auto wanted = static_cast<__mmask32>((uint64_t{1} << left) - 1);
        const CodedRow row = code_row(_mm512_maskz_loadu_epi16(wanted, values + i), base);
        exceptions += __builtin_popcount(row.is_exception);
    }
    return exceptions;
}

// --- Attention ---

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

inline void expand_codes(const Int8Code* codes, int64_t count, Bfloat16* out) {
    for (int64_t i = 0; i < count; i += 16) {
        const __m512i v = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        const __m512i bits = _mm512_castps_si512(_mm512_cvtepi32_ps(v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
}
inline __m512i fp8_words(__m256i codes) {
    const __m512i v = _mm512_cvtepu8_epi16(codes), high = _mm512_slli_epi16(v, 8);
    const __m512i value = fp8_normal(high);
    const bool is_normal = _mm512_testn_epi16_mask(high, _mm512_set1_epi16(0x7800)) == 0;
    return __builtin_expect(is_normal, 1) ? value : fp8_subnormal(value, high, v);
}
inline void expand_codes(const Fp8Code* codes, int64_t count, Bfloat16* out) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        _mm512_storeu_si512(out + i, fp8_words(v));
    }
    if (i < count) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
        const __m512i words = fp8_words(_mm256_zextsi128_si256(v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_castsi512_si256(words));
    }
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
