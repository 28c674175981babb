// table4 and k_table4: nibbles that look up one of 16 values, each an int8 times a power of two that all share (IQ4_NL,
// E2M1 of MXFP4 and NVFP4; IQ4_XS). The table lies behind the scales, float32 [16], and behind it a factor and a
// divisor of all scales. The codes' lines: codes.h.
#pragma once

#include "formats/nested.h"

namespace amalgam {
namespace {

// What a line's nibbles look up, for both.
struct TableLoader {
    explicit TableLoader(const Run& run) : table(load_table(run.weight->looked_up)) {}
    template <int kQuad>
    Bytes quad(const uint8_t* lines) const {
        return look_up(table, CodeLines<4>::quad<kQuad>(lines));
    }
    Table table;
};

struct Table4 : CodeFormat<Table4, 4> {
    static constexpr const char* kName = "table4";
    static constexpr bool kIsTable = true;
    static constexpr int kZero = kInt8Bias, kLargest = 127;
    using Loader = TableLoader;
    static Partial dot(const Partial& sum, const Bytes& w, Operand4 x) { return dot_looked_up(sum, w, x); }
};

struct KTable4 : NestedFormat<KTable4, 4, 32, PartKind::kScales> {
    static constexpr const char* kName = "k_table4";
    static constexpr bool kIsTable = true;
    static constexpr int kZero = kInt8Bias, kLargest = 127;
    using Loader = TableLoader;
    static Partial dot(const Partial& sum, const Bytes& w, Operand4 x) { return dot_looked_up(sum, w, x); }
};

}  // namespace
}  // namespace amalgam
