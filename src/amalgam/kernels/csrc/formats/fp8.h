// fp8: E4M3 without infinities; a weight with a NaN is not packed. One lane:
//
//     i0 i2 i1 i3
//
// so that both halves become bfloat16 pairs by moving bits within words.
#pragma once

#include "formats/format.h"

namespace amalgam {
namespace {

struct Fp8 : LineFormat<Fp8, 8> {
    static constexpr const char* kName = "fp8";
    static constexpr Operand kOperand = Operand::kBfloat16;
    static constexpr bool kHasScale = true;
    static constexpr float kScaleFactor = 256.0f;  // load_fp8 gives value / 256
    static constexpr int64_t kDirectRows = kTileRows;
    static constexpr int kLinesPerStep = 1, kPartsPerStep = 1;

    static constexpr int shift(int64_t p) { return static_cast<int>(p % 2 * 16 + p % 4 / 2 * 8); }
    static float decode(uint32_t code, float) { return widen_e4m3(code); }

    static uint32_t encode(uint32_t word) { return (word & 0xff0000ff) | (word >> 8 & 0xff00) | (word & 0xff00) << 8; }
    // The high bit of each byte that is a NaN.
    static uint32_t unpackable(uint32_t word) { return ((word & 0x7f7f7f7f) + 0x01010101) & 0x80808080; }

    static void expand_pairs(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
        if (w.is_scaled_by_value()) return LineFormat<Fp8, 8>::expand_pairs(w, panel, first, end, out);
        const uint8_t* line = w.panel(panel) + first / 4 * kLineBytes;
        for (int64_t input = first; input < end; input += 4, line += kLineBytes, out += 2 * kLineBytes) {
            Pairs low, high;
            load_fp8(line, low, high);
            store_pairs(out, low);
            store_pairs(out + kLineBytes, high);
        }
    }

    struct Loader {
        explicit Loader(const Run&) {}
        void load(const uint8_t* line, int, Pairs& first, Pairs& second) const { load_fp8(line, first, second); }
    };
};

}  // namespace
}  // namespace amalgam
