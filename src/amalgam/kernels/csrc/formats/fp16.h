// fp16: two float16 a lane, i0 in the low half.
#pragma once

#include "formats/format.h"

namespace amalgam {
namespace {

struct Fp16 : LineFormat<Fp16, 16> {
    static constexpr const char* kName = "fp16";
    static constexpr Operand kOperand = Operand::kFloat32;

    static constexpr int shift(int64_t p) { return static_cast<int>(p % 2 * 16); }
    static float decode(uint32_t code, float) { return widen(Float16{static_cast<uint16_t>(code)}); }
};

}  // namespace
}  // namespace amalgam
