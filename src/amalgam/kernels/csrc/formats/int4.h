// int4: unsigned nibbles, less a zero point of 8 or, where the weight has them, one per row and group. One lane:
//
//     i0|i4 i1|i5 i2|i6 i3|i7     low|high nibble
#pragma once

#include "formats/codes.h"

namespace amalgam {
namespace {

struct Int4 : LineFormat<Int4, 4> {
    static constexpr const char* kName = "int4";
    static constexpr Operand kOperand = Operand::kInt8;
    static constexpr bool kHasScale = true, kTakesZero = true, kTakesOffset = true, kTakesOrder = true;
    static constexpr int kZero = 8;
    static constexpr int64_t kDirectRows = kAnyRows;
    static constexpr int kDotsPerLine = 2;

    // Lines of codes, where partial sums of 16 bits take fewer instructions than chains of 32; with one row latency
    // matters more.
    static constexpr bool kIsCodes = kLargestPartial <= 32767;
    static constexpr int kChainRows = 1;
    static constexpr int kLargest = 15;
    using Lines = CodeLines<4>;
    using Quads = Lines;
    using Loader = CodeLoader<4>;
    static Partial dot(const Partial& sum, const Bytes& w, Operand4 x) { return dot_codes(sum, w, x); }

    static constexpr int shift(int64_t p) { return static_cast<int>(p % 4 * 8 + p % 8 / 4 * 4); }
    static float decode(uint32_t code, float zero) { return static_cast<float>(static_cast<int32_t>(code)) - zero; }

    static uint32_t encode(uint32_t word) { return spread(word & 0xffff) | spread(word >> 16) << 4; }

    // A row's nibbles in packed order, into zeros.
    static void reorder(const uint8_t* row, const int32_t* order, int64_t columns, uint8_t* out) {
        for (int64_t i = 0; i < columns; ++i) {
            const int32_t source = order[i];
            const int nibble = row[source / 2] >> source % 2 * 4 & 15;
            out[i / 2] |= static_cast<uint8_t>(nibble << i % 2 * 4);
        }
    }

    // What the zero points come to, less the sum of a chunk's activations times each.
    static Ints first_sum(const Run& run, int64_t group, int32_t negative_sum) {
        return run.zero != nullptr ? zero_times(run.zero + group * kPanelRows, negative_sum)
                                   : broadcast_int(negative_sum * 8);
    }

    // One line, added to the sums from `chain` on.
    template <int M, int kChains>
    static void add_line(const uint8_t* line, const TileRows& x, int64_t at, int chain, Ints (*sum)[M]) {
        Bytes low, high;
        load_nibbles(line, low, high);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            Ints& first = sum[chain % kChains][m];
            first = dot_nibbles(first, low, broadcast4(x.values[m] + at));
            Ints& second = sum[(chain + 1) % kChains][m];
            second = dot_nibbles(second, high, broadcast4(x.values[m] + at + 4));
        }
    }

 private:
    // Four nibbles → the low halves of four bytes.
    static uint32_t spread(uint32_t nibbles) {
        nibbles = (nibbles | nibbles << 8) & 0x00ff00ff;
        return (nibbles | nibbles << 4) & 0x0f0f0f0f;
    }
};

}  // namespace
}  // namespace amalgam
