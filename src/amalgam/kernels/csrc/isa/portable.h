// The primitives in plain C++: the meaning that the same names must have in every other header of an instruction set.
//
// A register has sixteen lanes of 32 bits, one per output row of a panel.
#pragma once

#include <algorithm>
#include <limits>

#include "isa/float_types.h"

namespace amalgam {
namespace {

constexpr int kTileRows = 4;  // rows of a tile: as many as have their accumulators in registers
constexpr int kPairSums = 1;  // accumulators of bfloat16 pairs, used in turn; 1 or 2
// Panels that many rows of int8 are multiplied with at once (product/wide.h), which takes 32 registers; 1: only one.
// With more, a header also has what avx512_lines.h has for it.
constexpr int kWidePanels = 1;
// From how many rows on that pays, without parts that have scales of their own and with them; at least 8.
constexpr int64_t kMinWideRows = 8, kMinWidePartsRows = 8;
// Most rows for which coded lines are decoded in the tile function; with few registers, above that, they are expanded
// first.
constexpr int kDirectCodedRows = 0;
// dot_int8 sums (stored byte - 128 + kInt8Bias) * x: what is left for the caller to subtract, times the sum of x.
constexpr int32_t kInt8Bias = 0;
// The largest magnitude that a lane of a Partial holds.
constexpr int64_t kLargestPartial = std::numeric_limits<int32_t>::max();

struct Floats {
    float lane[kPanelRows];
};
struct Ints {
    int32_t lane[kPanelRows];
};
struct Bytes {  // 4 inputs of each lane
    int8_t byte[kLineBytes];
};
struct Pairs {  // 2 bfloat16 inputs of each lane
    uint32_t lane[kPanelRows];
};
struct Operand4 {  // 4 bytes or 2 bfloat16 of one row of activations
    uint32_t word;
};

template <class Function>
inline Floats each_float(Function&& function) {
    Floats result;
    for (int lane = 0; lane < kPanelRows; ++lane) result.lane[lane] = function(lane);
    return result;
}

inline Floats zero_floats() {
    return each_float([](int) { return 0.0f; });
}
inline Floats broadcast_float(const float* p) {
    return each_float([=](int) { return *p; });
}
inline Floats load_floats(const float* p) {
    return each_float([=](int lane) { return p[lane]; });
}
inline void store_floats(float* p, const Floats& v) { std::memcpy(p, v.lane, sizeof v); }
inline Floats add(const Floats& a, const Floats& b) {
    return each_float([&](int lane) { return a.lane[lane] + b.lane[lane]; });
}
inline Floats mul(const Floats& a, const Floats& b) {
    return each_float([&](int lane) { return a.lane[lane] * b.lane[lane]; });
}

inline Ints load_ints(const int32_t* p) {
    Ints result;
    std::memcpy(result.lane, p, sizeof result);
    return result;
}
inline void store_ints(int32_t* p, const Ints& v) { std::memcpy(p, v.lane, sizeof v); }
inline Ints add(const Ints& a, const Ints& b) {
    Ints result;
    for (int i = 0; i < 16; ++i) result.lane[i] = a.lane[i] + b.lane[i];
    return result;
}
inline Ints broadcast_int(int32_t v) {
    Ints result;
    for (int32_t& lane : result.lane) lane = v;
    return result;
}
inline Ints zero_times(const uint8_t* zero, int32_t factor) {
    Ints result;
    for (int lane = 0; lane < kPanelRows; ++lane) result.lane[lane] = zero[lane] * factor;
    return result;
}
inline Ints times(const Ints& v, int32_t factor) {
    Ints result;
    for (int lane = 0; lane < kPanelRows; ++lane) result.lane[lane] = v.lane[lane] * factor;
    return result;
}
inline Floats to_floats(const Ints& v) {
    return each_float([&](int lane) { return static_cast<float>(v.lane[lane]); });
}

inline Operand4 broadcast4(const void* p) {
    Operand4 result;
    std::memcpy(&result.word, p, sizeof result.word);
    return result;
}

inline void load_nibbles(const uint8_t* line, Bytes& low, Bytes& high) {
    for (int i = 0; i < kLineBytes; ++i) {
        low.byte[i] = static_cast<int8_t>(line[i] & 15);
        high.byte[i] = static_cast<int8_t>(line[i] >> 4);
    }
}
inline void store_bytes(uint8_t* line, const Bytes& v) { std::memcpy(line, v.byte, sizeof v); }
inline Bytes load_int8(const uint8_t* line) {
    Bytes result;
    for (int i = 0; i < kLineBytes; ++i) result.byte[i] = static_cast<int8_t>(line[i] ^ 0x80);
    return result;
}
// sum[lane] += w[lane] · x, exact.
inline Ints dot_int8(const Ints& sum, const Bytes& w, Operand4 x) {
    int32_t factor[4];
    for (int i = 0; i < 4; ++i) factor[i] = static_cast<int8_t>(x.word >> (8 * i));
    Ints result;
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const int8_t* byte = w.byte + 4 * lane;
        result.lane[lane] =
            sum.lane[lane] + byte[0] * factor[0] + byte[1] * factor[1] + byte[2] * factor[2] + byte[3] * factor[3];
    }
    return result;
}
inline Ints dot_nibbles(const Ints& sum, const Bytes& w, Operand4 x) { return dot_int8(sum, w, x); }

// --- Codes of fewer than 8 bits ---

inline Bytes load_bytes(const uint8_t* line) {
    Bytes result;
    std::memcpy(result.byte, line, sizeof result);
    return result;
}
// Each byte shifted right (left where kShift < 0) and masked; the mask keeps no bit that another byte shifts in.
template <int kShift, int kMask>
inline Bytes field(const Bytes& v) {
    Bytes result;
    for (int i = 0; i < kLineBytes; ++i) {
        const int byte = static_cast<uint8_t>(v.byte[i]);
        result.byte[i] = static_cast<int8_t>((kShift >= 0 ? byte >> kShift : byte << -kShift) & kMask);
    }
    return result;
}
inline Bytes join(const Bytes& a, const Bytes& b) {
    Bytes result;
    for (int i = 0; i < kLineBytes; ++i) result.byte[i] = static_cast<int8_t>(a.byte[i] | b.byte[i]);
    return result;
}
// 16 int8, which bytes below 16 look up; the results are what dot_int8 takes.
struct Table {
    int8_t value[16];
};
inline Table load_table(const int8_t* values) {
    Table table;
    std::memcpy(table.value, values, sizeof table);
    return table;
}
inline Bytes look_up(const Table& table, const Bytes& index) {
    Bytes result;
    for (int i = 0; i < kLineBytes; ++i) result.byte[i] = table.value[index.byte[i] & 15];
    return result;
}
inline Bytes subtract_bytes(const Bytes& v, int from_all) {
    Bytes result;
    for (int i = 0; i < kLineBytes; ++i) result.byte[i] = static_cast<int8_t>(v.byte[i] - from_all);
    return result;
}

// A sum of a few dot products, in whatever form is quickest: each lane is one number or two that have to be added.
using Partial = Ints;
inline Partial zero_partial() { return broadcast_int(0); }
inline Partial dot_codes(const Partial& sum, const Bytes& w, Operand4 x) { return dot_int8(sum, w, x); }
inline Partial dot_looked_up(const Partial& sum, const Bytes& w, Operand4 x) { return dot_int8(sum, w, x); }
inline Ints add_partial(const Ints& sum, const Partial& partial) { return add(sum, partial); }

// Two int8 of each lane, side by side in memory, as int16.
inline Pairs load_byte_pairs(const uint8_t* p) {
    Pairs result;
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const auto wide = [&](int i) { return static_cast<uint16_t>(static_cast<int8_t>(p[2 * lane + i])); };
        result.lane[lane] = wide(0) | uint32_t{wide(1)} << 16;
    }
    return result;
}
// The same of nibbles: a pair of the low ones and a pair of the high ones.
inline void load_nibble_pairs(const uint8_t* p, Pairs& low, Pairs& high) {
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const uint32_t first = p[2 * lane], second = p[2 * lane + 1];
        low.lane[lane] = (first & 15) | (second & 15) << 16;
        high.lane[lane] = first >> 4 | second >> 4 << 16;
    }
}
// sum[lane] += w0 x0 + w1 x1 of int16, exact.
inline Ints dot_shorts(const Ints& sum, const Pairs& w, Operand4 x) {
    Ints result;
    for (int lane = 0; lane < kPanelRows; ++lane) {
        result.lane[lane] = sum.lane[lane] + static_cast<int16_t>(w.lane[lane]) * static_cast<int16_t>(x.word) +
                            static_cast<int16_t>(w.lane[lane] >> 16) * static_cast<int16_t>(x.word >> 16);
    }
    return result;
}
// One of a pair, in the form that add_scaled multiplies.
using PartScale = Ints;
inline PartScale first_scale(const Pairs& pairs) {
    PartScale result;
    for (int lane = 0; lane < kPanelRows; ++lane) result.lane[lane] = static_cast<int16_t>(pairs.lane[lane]);
    return result;
}
inline PartScale second_scale(const Pairs& pairs) {
    PartScale result;
    for (int lane = 0; lane < kPanelRows; ++lane) result.lane[lane] = static_cast<int16_t>(pairs.lane[lane] >> 16);
    return result;
}
inline Ints add_scaled(const Ints& sum, const Partial& partial, const PartScale& scale) {
    Ints result;
    for (int lane = 0; lane < kPanelRows; ++lane) {
        result.lane[lane] = sum.lane[lane] + partial.lane[lane] * scale.lane[lane];
    }
    return result;
}

// 16 scales of any type that they are stored in.
inline Floats load_scales(const void* p, DType dtype) {
    Floats result;
    widen_all(p, dtype, kPanelRows, result.lane);
    return result;
}

// Eight values of a floating type from each of two places.
inline Floats load_halves(const void* first, const void* second, DType dtype) {
    Floats result;
    widen_all(first, dtype, kPanelRows / 2, result.lane);
    widen_all(second, dtype, kPanelRows / 2, result.lane + kPanelRows / 2);
    return result;
}

inline Pairs load_pairs(const uint8_t* line) {
    Pairs result;
    std::memcpy(result.lane, line, sizeof result);
    return result;
}
inline void store_pairs(uint8_t* line, const Pairs& v) { std::memcpy(line, v.lane, sizeof v); }
// Byte kByte of each lane.
template <int kByte, bool kIsSigned>
inline Ints byte_of(const Bytes& v) {
    Ints result;
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const int8_t byte = v.byte[4 * lane + kByte];
        result.lane[lane] = kIsSigned ? byte : static_cast<uint8_t>(byte);
    }
    return result;
}
// Two of each lane as bfloat16: to nearest, ties to even; or that are integers below 256, and so are exact.
inline Pairs join_rounded(const Floats& first, const Floats& second) {
    Pairs result;
    for (int lane = 0; lane < kPanelRows; ++lane) {
        result.lane[lane] = bfloat16_bits(first.lane[lane]) | uint32_t{bfloat16_bits(second.lane[lane])} << 16;
    }
    return result;
}
inline Pairs join_exact(const Floats& first, const Floats& second) {
    Pairs result;
    for (int lane = 0; lane < kPanelRows; ++lane) {
        result.lane[lane] = as_bits(first.lane[lane]) >> 16 | (as_bits(second.lane[lane]) & 0xffff0000);
    }
    return result;
}
// sum[lane] = (sum[lane] + w1 x1) + w0 x0: the order of vdpbf16ps. The products are exact.
inline Floats dot_pairs(const Floats& sum, const Pairs& w, Operand4 x) {
    const float second = as_float(x.word & 0xffff0000), first = as_float(x.word << 16);
    return each_float([&](int lane) {
        return sum.lane[lane] + as_float(w.lane[lane] & 0xffff0000) * second + as_float(w.lane[lane] << 16) * first;
    });
}
// Inputs 0, 1 and 2, 3 of an fp8 line as bfloat16 pairs of value / 256.
inline void load_fp8(const uint8_t* line, Pairs& first, Pairs& second) {
    const auto bits = [](uint32_t code) { return as_bits(widen_e4m3(code & 0xff) * 0x1p-8f); };
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const uint8_t* byte = line + 4 * lane;
        first.lane[lane] = bits(byte[0]) >> 16 | (bits(byte[2]) & 0xffff0000);
        second.lane[lane] = bits(byte[1]) >> 16 | (bits(byte[3]) & 0xffff0000);
    }
}

// What the nibbles of a coded line add to the high and low bytes of bfloat16 (formats/bf16_coded.h).
struct Codes {
    uint16_t exponent[16];
};
inline Codes load_codes(const uint8_t* high, const uint8_t* low) {
    Codes codes;
    for (int i = 0; i < 16; ++i) codes.exponent[i] = static_cast<uint16_t>(high[i] << 8 | low[i]);
    return codes;
}
// Half 0 or 1 of three lines → its inputs 0, 1 and 2, 3.
inline void load_coded(const uint8_t* lines, int half, const Codes& codes, Pairs& first, Pairs& second) {
    const auto value = [&](int at) {
        const uint32_t rest = lines[half * kLineBytes + at], code = lines[2 * kLineBytes + at] >> 4 * half & 15;
        return (rest & 0x80) << 8 | (rest & 0x7f) | codes.exponent[code];
    };
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const int at = lane / 4 * 16 + lane % 4 * 2;
        first.lane[lane] = value(at) | value(at + 1) << 16;
        second.lane[lane] = value(at + 8) | value(at + 9) << 16;
    }
}

// Half 0 or 1 of a line of nibbles alone → its inputs 0, 1 and 2, 3, whose bytes are the codes
// (formats/float_table4.h).
inline void load_looked_up(const uint8_t* line, int half, const Codes& codes, Pairs& first, Pairs& second) {
    const auto value = [&](int at) { return uint32_t{codes.exponent[line[at] >> 4 * half & 15]}; };
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const int at = lane / 4 * 16 + lane % 4 * 2;
        first.lane[lane] = value(at) | value(at + 1) << 16;
        second.lane[lane] = value(at + 8) | value(at + 9) << 16;
    }
}

// Inputs [0, count) of four rows, count a multiple of 8, whose exponents have places from `window` on → what the rows
// have in their lines (formats/bf16_coded.h), 16 bytes of each line. Returns a bit for each row with exceptions.
inline int code_rows(const uint16_t* const* rows, int64_t count, int window, uint8_t* lines) {
    int with_exceptions = 0;
    for (int row = 0; row < 4; ++row) {
        for (int64_t i = 0; i < count; ++i) {
            const uint32_t bits = rows[row][i], place = (bits >> 7 & 0xff) - static_cast<uint32_t>(window);
            const bool is_inside = place - 1 < 15, is_zero = (bits & 0x7fff) == 0;
            uint8_t* line = lines + i / 8 * 3 * kLineBytes + i % 4 / 2 * 8 + row * 2 + i % 2;
            line[i % 8 / 4 * kLineBytes] =
                static_cast<uint8_t>(is_inside || is_zero ? (bits >> 8 & 0x80) | (bits & 0x7f) : 0);
            const uint32_t code = is_inside ? place : 0;
            uint8_t& nibbles = line[2 * kLineBytes];
            nibbles = static_cast<uint8_t>(i % 8 < 4 ? code : nibbles | code << 4);
            if (!is_inside && !is_zero) with_exceptions |= 1 << row;
        }
    }
    return with_exceptions;
}
// How many of `count` values are neither zero nor have an exponent with a place from `window` on.
inline int64_t count_exceptions(const uint16_t* values, int64_t count, int window) {
    int64_t exceptions = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = values[i], place = (bits >> 7 & 0xff) - static_cast<uint32_t>(window);
        exceptions += place - 1 >= 15 && (bits & 0x7fff) != 0;
    }
    return exceptions;
}

inline void prefetch(const uint8_t*) {}      // into L1
inline void prefetch_far(const uint8_t*) {}  // into L2

// --- Attention ---

constexpr int kAccumulators = 4;  // registers that the microkernel accumulates in
// Whether few rows multiply keys and values as they are packed, in registers; needs transpose_four and interleave_two.
constexpr bool kFusesPacking = false;

inline Floats broadcast(float value) { return broadcast_float(&value); }
inline Floats subtract(const Floats& a, const Floats& b) {
    return each_float([&](int lane) { return a.lane[lane] - b.lane[lane]; });
}
// a b + c, rounded once where there is such an instruction.
inline Floats fused(const Floats& a, const Floats& b, const Floats& c) { return add(mul(a, b), c); }
// b where a is NaN.
inline Floats maximum(const Floats& a, const Floats& b) {
    return each_float([&](int lane) { return a.lane[lane] > b.lane[lane] ? a.lane[lane] : b.lane[lane]; });
}
inline float highest_lane(const Floats& v) { return *std::max_element(v.lane, v.lane + kPanelRows); }
// Lanes [first, end), minus infinity elsewhere.
inline Floats keep_range(const Floats& v, int first, int end) {
    return each_float(
        [&](int lane) { return lane >= first && lane < end ? v.lane[lane] : -std::numeric_limits<float>::infinity(); });
}
// v times two to the power of the integer in the low bits of `exponent`.
inline Floats scale_exponent(const Floats& v, const Floats& exponent) {
    return each_float([&](int lane) { return as_float(as_bits(v.lane[lane]) + (as_bits(exponent.lane[lane]) << 23)); });
}
// v, or 0 where x < limit.
inline Floats zero_below(const Floats& v, const Floats& x, float limit) {
    return each_float([&](int lane) { return x.lane[lane] < limit ? 0.0f : v.lane[lane]; });
}
// Stores v as 16 bfloat16 and returns what they are.
inline Floats store_bfloat16(float* out, const Floats& v) {
    auto* bits = reinterpret_cast<uint8_t*>(out);
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const uint16_t rounded = bfloat16_bits(v.lane[lane]);
        std::memcpy(bits + lane * sizeof rounded, &rounded, sizeof rounded);
    }
    return each_float([&](int lane) { return as_float(uint32_t{bfloat16_bits(v.lane[lane])} << 16); });
}
// out[word][row] = rows[row][word] for 16 rows of 16 words; `stride` floats between the results.
inline void transpose(const float* const* rows, float* out, int64_t stride) {
    for (int word = 0; word < kPanelRows; ++word) {
        for (int row = 0; row < kPanelRows; ++row) std::memcpy(out + word * stride + row, rows[row] + word, 4);
    }
}
// Codes as bfloat16, exactly; of fp8, value / 256. count is a multiple of 16.
inline void expand_codes(const Int8Code* codes, int64_t count, Bfloat16* out) {
    for (int64_t i = 0; i < count; ++i) out[i].bits = static_cast<uint16_t>(as_bits(widen(codes[i])) >> 16);
}
inline void expand_codes(const Fp8Code* codes, int64_t count, Bfloat16* out) {
    for (int64_t i = 0; i < count; ++i) out[i].bits = static_cast<uint16_t>(as_bits(widen(codes[i]) * 0x1p-8f) >> 16);
}
// Words of (a[i], b[i]), a in the low half; count is a multiple of 16.
inline void interleave_pairs(const uint16_t* a, const uint16_t* b, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t word = a[i] | uint32_t{b[i]} << 16;
        std::memcpy(out + i, &word, sizeof word);
    }
}

}  // namespace
}  // namespace amalgam
