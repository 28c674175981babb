// The scale and offset of one group of a quantized panel, whatever types they are stored in.
#pragma once

#include <cstdint>

#include "isa/isa.h"
#include "product/matrix.h"

namespace amalgam {
namespace {

// What turns the codes of one group or part of a panel into values, a float per lane: value = scale * (code - zero),
// or scale * code + minimum, or scale * table[code].
struct GroupValues {
    alignas(64) float scale[kPanelRows] = {};
    alignas(64) float zero[kPanelRows] = {};
    alignas(64) float minimum[kPanelRows] = {};
    int64_t index = -1;

    template <class F>
    void load(const Matrix& w, int64_t panel, int64_t wanted) {
        if (index == wanted) return;
        index = wanted;
        const int64_t group = F::kPart > 0 ? wanted * F::kPart / w.group : wanted, at = panel * w.num_groups + group;
        if (w.scale_lanes == 1) {
            widen_all(advance(w.scale, w.scale_dtype, at), w.scale_dtype, 1, scale);
            for (int lane = 1; lane < kPanelRows; ++lane) scale[lane] = scale[0];
        } else {
            widen_all(advance(w.scale, w.scale_dtype, at * kPanelRows), w.scale_dtype, kPanelRows, scale);
        }
        if (w.factor != 1.0f || w.divisor != 1.0f) {
            for (float& value : scale) value = value * w.factor / w.divisor;
        }
        for (int lane = 0; lane < kPanelRows; ++lane) {
            zero[lane] =
                w.zero != nullptr ? static_cast<float>(w.zero[at * kPanelRows + lane]) : static_cast<float>(F::kZero);
        }
        if (w.offset != nullptr) {
            float* to = w.offset_kind == Offset::kZero ? zero : minimum;
            widen_all(advance(w.offset, w.scale_dtype, at * kPanelRows), w.scale_dtype, kPanelRows, to);
        }
        if constexpr (F::kPart > 0) {
            const uint8_t* pair = w.parts + (panel * w.num_pairs() + wanted / 2) * F::kPairBytes;
            for (int lane = 0; lane < kPanelRows; ++lane) {
                const int which = static_cast<int>(wanted % 2);
                scale[lane] *= static_cast<float>(F::part_scale(pair, lane, which));
                if constexpr (F::kTakesOffset) {
                    minimum[lane] *= -static_cast<float>(F::part_minimum(pair, lane, which));
                }
            }
        }
    }
};

}  // namespace
}  // namespace amalgam
