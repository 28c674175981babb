// int8: value + 128, or an unsigned byte with a floating offset per row and group. One lane:
//
//     i0 i1 i2 i3
#pragma once

#include "formats/format.h"

namespace amalgam {
namespace {

struct Int8 : LineFormat<Int8, 8> {
    static constexpr const char* kName = "int8";
    static constexpr Operand kOperand = Operand::kInt8;
    static constexpr bool kHasScale = true, kTakesOffset = true;
    static constexpr int kZero = 128;
    static constexpr int64_t kDirectRows = kAnyRows;
    static constexpr int kDotsPerLine = 1;

    struct Quads {
        static constexpr int kStep = 4, kLines = 1;
        template <int>
        static Bytes quad(const uint8_t* line) {
            return load_bytes(line);
        }
    };

    static constexpr int shift(int64_t p) { return static_cast<int>(p % 4 * 8); }
    static float decode(uint32_t code, float zero) { return static_cast<float>(static_cast<int32_t>(code)) - zero; }

    static uint32_t encode(uint32_t word) { return word ^ 0x80808080; }

    static Ints first_sum(const Run&, int64_t, int32_t negative_sum) { return broadcast_int(negative_sum * kInt8Bias); }

    // One line, added to the sums of `chain`.
    template <int M, int kChains>
    static void add_line(const uint8_t* line, const TileRows& x, int64_t at, int chain, Ints (*sum)[M]) {
        const Bytes w = load_int8(line);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            Ints& only = sum[chain % kChains][m];
            only = dot_int8(only, w, broadcast4(x.values[m] + at));
        }
    }
};

}  // namespace
}  // namespace amalgam
