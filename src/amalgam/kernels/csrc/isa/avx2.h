// One panel line in two registers: AVX2. portable.h says what each function means.
#pragma once

#include <immintrin.h>

#include "isa/float_types.h"
#include "isa/x86_prefetch.h"

namespace amalgam {
namespace {

constexpr int kTileRows = 4;
constexpr int kPairSums = 1;
constexpr int kWidePanels = 1;
constexpr int64_t kMinWideRows = 8, kMinWidePartsRows = 8;
constexpr int kDirectCodedRows = 2;
constexpr int32_t kInt8Bias = 0;
constexpr int64_t kLargestPartial = 32767;

struct Floats {
    __m256 a, b;
};
struct Words {
    __m256i a, b;
};
using Ints = Words;
using Bytes = Words;
using Pairs = Words;
using Operand4 = __m256i;

inline Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast_float(const float* p) { return {_mm256_broadcast_ss(p), _mm256_broadcast_ss(p)}; }
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_floats(float* p, Floats v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
}
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }

inline Ints load_ints(const int32_t* p) {
    const auto* from = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline void store_ints(int32_t* p, Ints v) {
    auto* to = reinterpret_cast<__m256i*>(p);
    _mm256_storeu_si256(to, v.a);
    _mm256_storeu_si256(to + 1, v.b);
}
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Ints broadcast_int(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline Ints zero_times(const uint8_t* zero, int32_t factor) {
    const __m256i by = _mm256_set1_epi32(factor);
    const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero)));
    const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zero + 8)));
    return {_mm256_mullo_epi32(a, by), _mm256_mullo_epi32(b, by)};
}
inline Ints times(Ints v, int32_t factor) {
    const __m256i by = _mm256_set1_epi32(factor);
    return {_mm256_mullo_epi32(v.a, by), _mm256_mullo_epi32(v.b, by)};
}
inline Floats to_floats(Ints v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

inline int32_t load_word(const void* p) {
    int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return word;
}
inline Operand4 broadcast4(const void* p) { return _mm256_set1_epi32(load_word(p)); }

inline Words load_words(const uint8_t* line) {
    const auto* p = reinterpret_cast<const __m256i*>(line);
    return {_mm256_load_si256(p), _mm256_load_si256(p + 1)};
}
inline void load_nibbles(const uint8_t* line, Bytes& low, Bytes& high) {
    const __m256i mask = _mm256_set1_epi8(15);
    const Words v = load_words(line);
    low = {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
    high = {_mm256_and_si256(_mm256_srli_epi16(v.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(v.b, 4), mask)};
}
inline Bytes load_int8(const uint8_t* line) {
    const __m256i offset = _mm256_set1_epi8(static_cast<char>(0x80));
    const Words v = load_words(line);
    return {_mm256_xor_si256(v.a, offset), _mm256_xor_si256(v.b, offset)};
}
// A sum that is to be added here. GCC moves additions down to where sums are read, and spills all products until then.
inline __m256i summed(__m256i sum) {
    asm("" : "+x"(sum));
    return sum;
}
// Sums of two products fit 16 bits: 2 * 15 * 127 here, 2 * 128 * 127 below.
inline __m256i dot_half(__m256i sum, __m256i w_unsigned, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(w_unsigned, x);
    return summed(_mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
inline Ints dot_nibbles(Ints sum, Bytes w, Operand4 x) { return {dot_half(sum.a, w.a, x), dot_half(sum.b, w.b, x)}; }
// The weight's sign goes over to the activation, which is never -128.
inline Ints dot_int8(Ints sum, Bytes w, Operand4 x) {
    return {dot_half(sum.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a)),
            dot_half(sum.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b))};
}

// --- Codes of fewer than 8 bits ---

inline Bytes load_bytes(const uint8_t* line) { return load_words(line); }
template <int kShift, int kMask>
inline Bytes field(Bytes v) {
    const __m256i mask = _mm256_set1_epi8(kMask);
    if constexpr (kShift == 0) {
        return {_mm256_and_si256(v.a, mask), _mm256_and_si256(v.b, mask)};
    } else if constexpr (kShift > 0) {
        return {_mm256_and_si256(_mm256_srli_epi16(v.a, kShift), mask),
                _mm256_and_si256(_mm256_srli_epi16(v.b, kShift), mask)};
    } else {
        return {_mm256_and_si256(_mm256_slli_epi16(v.a, -kShift), mask),
                _mm256_and_si256(_mm256_slli_epi16(v.b, -kShift), mask)};
    }
}
inline Bytes join(Bytes x, Bytes y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
using Table = __m256i;
inline Table load_table(const int8_t* values) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
}
inline Bytes look_up(Table table, Bytes index) {
    return {_mm256_shuffle_epi8(table, index.a), _mm256_shuffle_epi8(table, index.b)};
}

// Two int16 a lane: what maddubs gives, added up before it is widened.
using Partial = Words;
inline Partial zero_partial() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Partial dot_codes(Partial sum, Bytes w, Operand4 x) {
    return {summed(_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, x))),
            summed(_mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, x)))};
}
// The weight's sign goes over to the activation, as in dot_int8.
inline Partial dot_looked_up(Partial sum, Bytes w, Operand4 x) {
    const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a));
    const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b));
    return {summed(_mm256_add_epi16(sum.a, a)), summed(_mm256_add_epi16(sum.b, b))};
}
inline Ints add_shorts(Ints sum, Words w, Words x) {
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(w.a, x.a)), _mm256_add_epi32(sum.b, _mm256_madd_epi16(w.b, x.b))};
}
inline Ints add_partial(Ints sum, Partial partial) {
    const __m256i ones = _mm256_set1_epi16(1);
    return add_shorts(sum, partial, {ones, ones});
}

inline Pairs load_byte_pairs(const uint8_t* p) {
    const auto* from = reinterpret_cast<const __m128i*>(p);
    return {_mm256_cvtepi8_epi16(_mm_loadu_si128(from)), _mm256_cvtepi8_epi16(_mm_loadu_si128(from + 1))};
}
inline void load_nibble_pairs(const uint8_t* p, Pairs& low, Pairs& high) {
    const auto* from = reinterpret_cast<const __m128i*>(p);
    const __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128(from));
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(from + 1));
    const __m256i mask = _mm256_set1_epi16(15);
    low = {_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)};
    high = {_mm256_srli_epi16(a, 4), _mm256_srli_epi16(b, 4)};
}
inline Ints dot_shorts(Ints sum, Pairs w, Operand4 x) { return add_shorts(sum, w, {x, x}); }
using PartScale = Words;
inline PartScale first_scale(Pairs pairs) {
    const __m256i twice = _mm256_set1_epi64x(0x0504050401000100);
    const __m256i index = _mm256_add_epi64(twice, _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0));
    return {_mm256_shuffle_epi8(pairs.a, index), _mm256_shuffle_epi8(pairs.b, index)};
}
inline PartScale second_scale(Pairs pairs) {
    const __m256i twice = _mm256_set1_epi64x(0x0706070603020302);
    const __m256i index = _mm256_add_epi64(twice, _mm256_set_epi64x(0x0808080808080808, 0, 0x0808080808080808, 0));
    return {_mm256_shuffle_epi8(pairs.a, index), _mm256_shuffle_epi8(pairs.b, index)};
}
inline Ints add_scaled(Ints sum, Partial partial, PartScale scale) { return add_shorts(sum, partial, scale); }

inline __m256 widen_eight(const void* p, DType dtype, int half) {
    const auto* bytes = static_cast<const uint8_t*>(p);
    const auto* words = reinterpret_cast<const __m128i*>(bytes + 16 * half);
    const auto codes = [&] {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * half)));
    };
    switch (dtype) {
        case DType::kFloat32:
            return _mm256_loadu_ps(static_cast<const float*>(p) + 8 * half);
        case DType::kBfloat16:
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(words)), 16));
        case DType::kFloat16:
            return _mm256_cvtph_ps(_mm_loadu_si128(words));
        case DType::kE8m0:  // 0 is 2^-127, a subnormal number
            return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(codes(), 23), _mm256_set1_epi32(0x00400000)));
        default: {  // subnormal codes become normal in the product
            const __m256i code = codes();
            const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
            const __m256i magnitude = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x7f)), 20);
            const __m256 value = _mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(0x1p120f));
            return _mm256_or_ps(value, _mm256_castsi256_ps(sign));
        }
    }
}
inline Floats load_scales(const void* p, DType dtype) { return {widen_eight(p, dtype, 0), widen_eight(p, dtype, 1)}; }
inline Floats load_halves(const void* first, const void* second, DType dtype) {
    return {widen_eight(first, dtype, 0), widen_eight(second, dtype, 0)};
}

inline Pairs load_pairs(const uint8_t* line) { return load_words(line); }
template <int kByte, bool kIsSigned>
inline Ints byte_of(Bytes v) {
    const auto byte = [](__m256i x) {
        const __m256i high = kByte == 3 ? x : _mm256_slli_epi32(x, 24 - 8 * kByte);
        return kIsSigned ? _mm256_srai_epi32(high, 24) : _mm256_srli_epi32(high, 24);
    };
    return {byte(v.a), byte(v.b)};
}
inline __m256i join_bits(__m256i first, __m256i second) {  // the high halves of both
    return _mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xaa);
}
inline Pairs join_exact(Floats first, Floats second) {
    return {join_bits(_mm256_castps_si256(first.a), _mm256_castps_si256(second.a)),
            join_bits(_mm256_castps_si256(first.b), _mm256_castps_si256(second.b))};
}
// Rounded to bfloat16, in the high half of each lane.
inline __m256i rounded_high(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), nan, is_nan));
}
inline Pairs join_rounded(Floats first, Floats second) {
    return {join_bits(rounded_high(first.a), rounded_high(second.a)),
            join_bits(rounded_high(first.b), rounded_high(second.b))};
}
inline void store_pairs(uint8_t* line, Pairs v) {
    auto* p = reinterpret_cast<__m256i*>(line);
    _mm256_store_si256(p, v.a);
    _mm256_store_si256(p + 1, v.b);
}
inline __m256 dot_pairs_half(__m256 sum, __m256i w, __m256i x) {
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000));
    sum = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(w, high)),
                          _mm256_castsi256_ps(_mm256_and_si256(x, high)), sum);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
                           sum);
}
inline Floats dot_pairs(Floats sum, Pairs w, Operand4 x) {
    return {dot_pairs_half(sum.a, w.a, x), dot_pairs_half(sum.b, w.b, x)};
}

// A code in the high byte of each word → bfloat16 of its value / 256; `low_code` has the code in the low byte and zeros
// above. Normal numbers by moving bits, subnormal ones from a table whose halves are looked up side by side.
inline __m256i fp8_words(__m256i code, __m256i low_code) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, static_cast<char>(0x80), static_cast<char>(0xc0), 0, 0x20, 0x40, 0x60,  // low bytes
                      0, 0x37, 0x37, 0x37, 0x38, 0x38, 0x38, 0x38));                                // high bytes
    const __m256i magnitude = _mm256_and_si256(_mm256_srai_epi16(code, 4), _mm256_set1_epi16(0x07f0));
    const __m256i normal = _mm256_or_si256(magnitude, _mm256_set1_epi16(0x3800));
    const __m256i fraction = _mm256_and_si256(low_code, _mm256_set1_epi16(7));
    const __m256i index =
        _mm256_or_si256(_mm256_or_si256(fraction, _mm256_slli_epi16(fraction, 8)), _mm256_set1_epi16(0x0800));
    const __m256i is_normal = _mm256_cmpgt_epi16(magnitude, _mm256_set1_epi16(0x007f));
    const __m256i value = _mm256_blendv_epi8(_mm256_shuffle_epi8(table, index), normal, is_normal);
    return _mm256_or_si256(value, _mm256_and_si256(code, _mm256_set1_epi16(static_cast<short>(0x8000))));
}
inline void load_fp8(const uint8_t* line, Pairs& first, Pairs& second) {
    const Words v = load_words(line);
    const __m256i low = _mm256_set1_epi16(0x00ff);
    first = {fp8_words(_mm256_slli_epi16(v.a, 8), _mm256_and_si256(v.a, low)),
             fp8_words(_mm256_slli_epi16(v.b, 8), _mm256_and_si256(v.b, low))};
    second = {fp8_words(v.a, _mm256_srli_epi16(v.a, 8)), fp8_words(v.b, _mm256_srli_epi16(v.b, 8))};
}

// What the nibbles of a coded line add to the high and low bytes of bfloat16 (formats/bf16_coded.h).
struct Codes {
    __m256i high, low;
};
inline Codes load_codes(const uint8_t* high, const uint8_t* low) {
    const auto load = [](const uint8_t* table) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    };
    return {load(high), load(low)};
}
inline void coded_words(__m256i rest, __m256i nibbles, int half, const Codes& codes, __m256i& first, __m256i& second) {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80));
    const __m256i code = _mm256_and_si256(half == 0 ? nibbles : _mm256_srli_epi16(nibbles, 4), _mm256_set1_epi8(15));
    const __m256i high = _mm256_or_si256(_mm256_and_si256(rest, sign), _mm256_shuffle_epi8(codes.high, code));
    const __m256i low = _mm256_or_si256(_mm256_andnot_si256(sign, rest), _mm256_shuffle_epi8(codes.low, code));
    first = _mm256_unpacklo_epi8(low, high);
    second = _mm256_unpackhi_epi8(low, high);
}
// Half 0 or 1 of three lines → its inputs 0, 1 and 2, 3.
inline void load_coded(const uint8_t* lines, int half, const Codes& codes, Pairs& first, Pairs& second) {
    const Words rest = load_words(lines + half * kLineBytes), nibbles = load_words(lines + 2 * kLineBytes);
    coded_words(rest.a, nibbles.a, half, codes, first.a, second.a);
    coded_words(rest.b, nibbles.b, half, codes, first.b, second.b);
}

inline void looked_up_words(__m256i nibbles, int half, const Codes& codes, __m256i& first, __m256i& second) {
    const __m256i code = _mm256_and_si256(half == 0 ? nibbles : _mm256_srli_epi16(nibbles, 4), _mm256_set1_epi8(15));
    const __m256i high = _mm256_shuffle_epi8(codes.high, code), low = _mm256_shuffle_epi8(codes.low, code);
    first = _mm256_unpacklo_epi8(low, high);
    second = _mm256_unpackhi_epi8(low, high);
}
inline void load_looked_up(const uint8_t* line, int half, const Codes& codes, Pairs& first, Pairs& second) {
    const Words nibbles = load_words(line);
    looked_up_words(nibbles.a, half, codes, first.a, second.a);
    looked_up_words(nibbles.b, half, codes, first.b, second.b);
}

// The other way round. Sixteen values of one row: place in the window or 0; sign and mantissa, 0 for an exception.
struct CodedRow {
    __m256i code, rest, is_kept;
};
inline CodedRow code_row(__m256i bits, __m256i window) {
    const __m256i exponent = _mm256_srli_epi16(_mm256_slli_epi16(bits, 1), 8);
    const __m256i place = _mm256_sub_epi16(exponent, window), before = _mm256_sub_epi16(place, _mm256_set1_epi16(1));
    const __m256i is_inside = _mm256_cmpeq_epi16(_mm256_min_epu16(before, _mm256_set1_epi16(14)), before);
    const __m256i is_zero = _mm256_cmpeq_epi16(_mm256_slli_epi16(bits, 1), _mm256_setzero_si256());
    const __m256i is_kept = _mm256_or_si256(is_inside, is_zero);
    const __m256i sign = _mm256_and_si256(_mm256_srli_epi16(bits, 8), _mm256_set1_epi16(0x80));
    const __m256i rest = _mm256_or_si256(sign, _mm256_and_si256(bits, _mm256_set1_epi16(0x7f)));
    return {_mm256_and_si256(place, is_inside), _mm256_and_si256(rest, is_kept), is_kept};
}
// Bytes of four rows' eight inputs, in either half → inputs 0 to 3 of the rows, and 4 to 7.
inline Words gather_rows(__m256i row0, __m256i row1, __m256i row2, __m256i row3) {
    const __m256i by_pairs =
        _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15));
    const __m256i first = _mm256_shuffle_epi8(_mm256_packus_epi16(row0, row1), by_pairs);
    const __m256i last = _mm256_shuffle_epi8(_mm256_packus_epi16(row2, row3), by_pairs);
    return {_mm256_unpacklo_epi32(first, last), _mm256_unpackhi_epi32(first, last)};
}
inline int code_rows(const uint16_t* const* rows, int64_t count, int window, uint8_t* lines) {
    const __m256i base = _mm256_set1_epi16(static_cast<short>(window)), all = _mm256_set1_epi16(-1);
    __m256i kept[4] = {all, all, all, all};
    for (int64_t i = 0; i < count; i += 16) {
        const bool is_whole = i + 16 <= count;
        CodedRow row[4];
        for (int r = 0; r < 4; ++r) {
            const uint16_t* from = rows[r] + i;
            const __m256i bits = is_whole
                                     ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))
                                     : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
            row[r] = code_row(bits, base);
            kept[r] = _mm256_and_si256(kept[r], row[r].is_kept);
        }
        const Words rest = gather_rows(row[0].rest, row[1].rest, row[2].rest, row[3].rest);
        const Words code = gather_rows(row[0].code, row[1].code, row[2].code, row[3].code);
        const __m256i nibbles = _mm256_or_si256(code.a, _mm256_slli_epi16(code.b, 4));
        const auto store = [&](uint8_t* to, __m256i line) {
            _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(line));
            if (is_whole) {
                _mm_store_si128(reinterpret_cast<__m128i*>(to + 3 * kLineBytes), _mm256_extracti128_si256(line, 1));
            }
        };
        uint8_t* line = lines + i / 8 * 3 * kLineBytes;
        store(line, rest.a);
        store(line + kLineBytes, rest.b);
        store(line + 2 * kLineBytes, nibbles);
    }
    int with_exceptions = 0;
    for (int r = 0; r < 4; ++r) with_exceptions |= (_mm256_movemask_epi8(kept[r]) != -1) << r;
    return with_exceptions;
}
inline int64_t count_exceptions(const uint16_t* values, int64_t count, int window) {
    const __m256i base = _mm256_set1_epi16(static_cast<short>(window));
    int64_t exceptions = 0, i = 0;
    while (i + 16 <= count) {
        // As many as 16 bits hold: -1 for each value that is kept.
        __m256i kept = _mm256_setzero_si256();
        const int64_t first = i, end = i + (count - i < 16 * 0x7fff ? count - i : 16 * 0x7fff) / 16 * 16;
        for (; i < end; i += 16) {
            const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
            kept = _mm256_add_epi16(kept, code_row(bits, base).is_kept);
        }
        const __m256i pairs = _mm256_madd_epi16(kept, _mm256_set1_epi16(1));
        alignas(32) int32_t lanes[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), pairs);
        exceptions += i - first;
        for (const int32_t lane : lanes) exceptions += lane;
    }
    for (; i < count; ++i) {
        const uint32_t place = (values[i] >> 7 & 0xffu) - static_cast<uint32_t>(window);
        exceptions += place - 1 >= 15 && (values[i] & 0x7fff) != 0;
    }
    return exceptions;
}

// --- Attention ---

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
    const __m256i a = _mm256_and_si256(rounded_high(v.a), high), b = _mm256_and_si256(rounded_high(v.b), high);
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

inline void expand_codes(const Int8Code* codes, int64_t count, Bfloat16* out) {
    const auto words = [](__m128i eight) {
        const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
        return _mm256_srli_epi32(_mm256_castps_si256(values), 16);
    };
    for (int64_t i = 0; i < count; i += 16) {
        const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
        const __m256i packed = _mm256_packus_epi32(words(v), words(_mm_srli_si128(v, 8)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm256_permute4x64_epi64(packed, 0xd8));
    }
}
inline void expand_codes(const Fp8Code* codes, int64_t count, Bfloat16* out) {
    for (int64_t i = 0; i < count; i += 16) {
        const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), fp8_words(_mm256_slli_epi16(v, 8), v));
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
