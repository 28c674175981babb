#include <algorithm>
#include <limits>

#include "simd_portable.h"

// What attention needs besides: the meaning that the same functions in attention_*.cpp must have.
namespace amalgam {
namespace {

constexpr int kAccumulators = 4;  // blocks of 16 sums that stay in registers
// Whether there are enough registers to use what was packed at once; then transpose_four and interleave_two are needed.
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
// Words of (a[i], b[i]), a in the low half; count is a multiple of 16.
inline void interleave_pairs(const uint16_t* a, const uint16_t* b, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t word = a[i] | uint32_t{b[i]} << 16;
        std::memcpy(out + i, &word, sizeof word);
    }
}

}  // namespace
}  // namespace amalgam

#include "attention_kernels.h"

namespace amalgam {

const AttentionKernels kPortableAttention = {"portable", attention_scratch, attend, merge_attention};

}  // namespace amalgam
