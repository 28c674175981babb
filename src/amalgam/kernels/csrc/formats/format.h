// Weights taken out of their panels: as floats, exactly, or as bfloat16 pairs that still lack their scale.
#pragma once

#include "formats/bf16_coded.h"
#include "isa/float_types.h"
#include "product/matrix.h"

namespace amalgam {
namespace {

// Scales and zero points of one group of a panel, a float per lane.
struct GroupValues {
    alignas(64) float scale[kPanelRows] = {};
    alignas(64) float zero[kPanelRows] = {};
    int64_t group = -1;

    void load(const Matrix& w, int64_t panel, int64_t wanted) {
        if (group == wanted) return;
        group = wanted;
        const int64_t at = panel * w.num_groups + group;
        if (w.scale_lanes == 1) {
            widen_all(advance(w.scale, w.scale_dtype, at), w.scale_dtype, 1, scale);
            for (int lane = 1; lane < kPanelRows; ++lane) scale[lane] = scale[0];
        } else {
            widen_all(advance(w.scale, w.scale_dtype, at * kPanelRows), w.scale_dtype, kPanelRows, scale);
        }
        for (int lane = 0; lane < kPanelRows; ++lane) {
            zero[lane] = w.zero != nullptr ? static_cast<float>(w.zero[at * kPanelRows + lane]) : 8.0f;
        }
    }
};

template <Format F>
inline float decode(uint32_t code, float zero) {
    if constexpr (F == Format::kInt4) return static_cast<float>(static_cast<int32_t>(code)) - zero;
    if constexpr (F == Format::kInt8) return static_cast<float>(static_cast<int32_t>(code) - 128);
    if constexpr (F == Format::kFp8) return widen_e4m3(code);
    if constexpr (F == Format::kBfloat16) return widen(Bfloat16{static_cast<uint16_t>(code)});
    if constexpr (F == Format::kFloat16) return widen(Float16{static_cast<uint16_t>(code)});
    if constexpr (F == Format::kFloat32) return as_float(code);
}

// One input of all 16 rows. `position` counts packed inputs.
template <Format F, bool kIsScaled>
inline void expand_input(const uint8_t* panel, int64_t position, const GroupValues& values, float* out) {
    constexpr uint32_t kMask = static_cast<uint32_t>((uint64_t{1} << Matrix::bits(F)) - 1);
    uint32_t line[kPanelRows];
    std::memcpy(line, panel + position / Matrix::inputs_per_line(F) * kLineBytes, sizeof line);
    const int shift = Matrix::shift(F, position);
    for (int lane = 0; lane < kPanelRows; ++lane) {
        const float value = decode<F>(line[lane] >> shift & kMask, values.zero[lane]);
        out[lane] = kIsScaled ? value * values.scale[lane] : value;
    }
}

template <Format F>
void expand_floats(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
    constexpr bool kHasScale = F == Format::kInt4 || F == Format::kInt8 || F == Format::kFp8;
    const uint8_t* lines = w.panel(panel);
    GroupValues values;
    for (int64_t input = first; input < end; ++input, out += kPanelRows) {
        if (input >= w.columns) {
            std::memset(out, 0, sizeof(float) * kPanelRows);
            continue;
        }
        const int64_t position = w.position != nullptr ? w.position[input] : input;
        if constexpr (kHasScale) {
            const int64_t offset = position - values.group * w.group;
            if (values.group < 0 || offset < 0 || offset >= w.group) values.load(w, panel, position / w.group);
        }
        expand_input<F, kHasScale>(lines, position, values, out);
    }
}

// Inputs [first, end) of a panel, unscaled, as the lines of a bfloat16 panel. Integers below 256 are exact.
template <Format F>
void expand_pairs(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
    const uint8_t* lines = w.panel(panel);
    GroupValues values;
    for (int64_t position = first; position < end; position += 2, out += kLineBytes) {
        if constexpr (F == Format::kInt4) values.load(w, panel, position / w.group);
        alignas(64) float pair[2][kPanelRows];
        expand_input<F, false>(lines, position, values, pair[0]);
        expand_input<F, false>(lines, position + 1, values, pair[1]);
        uint32_t line[kPanelRows];
        for (int lane = 0; lane < kPanelRows; ++lane) {
            line[lane] = as_bits(pair[0][lane]) >> 16 | (as_bits(pair[1][lane]) & 0xffff0000);
        }
        std::memcpy(out, line, sizeof line);
    }
}

void expand(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
    switch (w.format) {
        case Format::kInt4:
            return expand_floats<Format::kInt4>(w, panel, first, end, out);
        case Format::kInt8:
            return expand_floats<Format::kInt8>(w, panel, first, end, out);
        case Format::kFp8:
            return expand_floats<Format::kFp8>(w, panel, first, end, out);
        case Format::kBfloat16:
            return expand_floats<Format::kBfloat16>(w, panel, first, end, out);
        case Format::kFloat16:
            return expand_floats<Format::kFloat16>(w, panel, first, end, out);
        case Format::kFloat32:
            return expand_floats<Format::kFloat32>(w, panel, first, end, out);
        case Format::kCodedBfloat16:
            return expand_coded_floats(w, panel, first, end, out);
    }
}

}  // namespace
}  // namespace amalgam
