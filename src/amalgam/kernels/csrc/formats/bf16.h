// bf16: two bfloat16 a lane, i0 in the low half. What other formats are expanded to for bfloat16 operands.
#pragma once

#include "formats/format.h"

namespace amalgam {
namespace {

struct Bf16 : LineFormat<Bf16, 16> {
    static constexpr const char* kName = "bf16";
    static constexpr Operand kOperand = Operand::kBfloat16;
    static constexpr int64_t kDirectRows = kAnyRows;
    static constexpr int kLinesPerStep = 2, kPartsPerStep = 1;

    static constexpr int shift(int64_t p) { return static_cast<int>(p % 2 * 16); }
    static float decode(uint32_t code, float) { return widen(Bfloat16{static_cast<uint16_t>(code)}); }

    struct Loader {
        explicit Loader(const Run&) {}
        void load(const uint8_t* line, int, Pairs& first, Pairs& second) const {
            first = load_pairs(line);
            second = load_pairs(line + kLineBytes);
        }
    };
};

}  // namespace
}  // namespace amalgam
