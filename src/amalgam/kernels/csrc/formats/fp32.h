// fp32: one float a lane. What other formats are expanded to for float32 operands.
#pragma once

#include "formats/format.h"

namespace amalgam {
namespace {

struct Fp32 : LineFormat<Fp32, 32> {
    static constexpr const char* kName = "fp32";
    static constexpr Operand kOperand = Operand::kFloat32;
    static constexpr int64_t kDirectRows = kAnyRows;

    static constexpr int shift(int64_t) { return 0; }
    static float decode(uint32_t code, float) { return as_float(code); }
};

}  // namespace
}  // namespace amalgam
