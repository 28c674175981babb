// What a weight format says of itself, and what follows from it.
//
// A format is a class without data that derives from LineFormat and has a line in table.h. Its lines are multiplied
// with one kind of operand, kOperand; for any other they are expanded, into lines of bf16.h or fp32.h.
#pragma once

#include <cstring>
#include <limits>

#include "isa/isa.h"
#include "product/matrix.h"
#include "product/tile.h"

namespace amalgam {
namespace {

constexpr int64_t kAnyRows = std::numeric_limits<int64_t>::max();

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

// F: the format itself, which redefines what is different and adds
//
//     kName         as Python knows it
//     kOperand      what its lines are multiplied with
//     shift(p)      how far input p of a line is shifted left within its lane
//     decode(code, zero)   the value of a code, unscaled
//
// and, where kDirectRows is not 0, for int8 operands kDotsPerLine, first_sum and add_line, for bfloat16 operands
// kLinesPerStep, kPartsPerStep and Loader (tiles.h). A format for int8 operands that matrix units multiply also has
// kByteLines, expand_bytes and byte_sum (unit.h).
template <class F, int kBitsPerInput>
struct LineFormat {
    static constexpr int kBits = kBitsPerInput;
    static constexpr int kBytesPerInput = kBits * kPanelRows / 8;  // of all rows of a panel
    static constexpr int kInputsPerLine = kLineBytes / kBytesPerInput;
    static constexpr bool kHasScale = false, kTakesZero = false, kTakesOrder = false;
    static constexpr float kScaleFactor = 1.0f;  // what loaded or expanded pairs lack; their scale makes up for it
    static constexpr int64_t kDirectRows = 0;    // most rows that multiply the lines as they are, unexpanded
    static constexpr bool kHasRest = false;      // whether lines leave something out, which add_rest adds
    static constexpr int kByteLines = 0;         // lines of unsigned bytes that a line becomes; 0: there are none

    // --- Packing ---

    // Four bytes of a row → one lane of a line.
    static uint32_t encode(uint32_t word) { return word; }
    // Not 0 where lines cannot hold the word.
    static uint32_t unpackable(uint32_t) { return 0; }

    // --- Expanding ---

    // Inputs [first, end) of a panel as floats [end - first, 16]: the weight's exact values.
    static void expand_floats(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
        const uint8_t* lines = w.panel(panel);
        GroupValues values;
        for (int64_t input = first; input < end; ++input, out += kPanelRows) {
            if (input >= w.columns) {
                std::memset(out, 0, sizeof(float) * kPanelRows);
                continue;
            }
            const int64_t position = w.position != nullptr ? w.position[input] : input;
            if constexpr (F::kHasScale) {
                const int64_t offset = position - values.group * w.group;
                if (values.group < 0 || offset < 0 || offset >= w.group) values.load(w, panel, position / w.group);
            }
            expand_input<F::kHasScale>(lines, position, values, out);
        }
    }

    // Packed inputs [first, end) of a panel, unscaled, as the lines of a bf16 panel. Integers below 256 are exact.
    static void expand_pairs(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
        const uint8_t* lines = w.panel(panel);
        GroupValues values;
        for (int64_t position = first; position < end; position += 2, out += kLineBytes) {
            if constexpr (F::kTakesZero) values.load(w, panel, position / w.group);
            alignas(64) float pair[2][kPanelRows];
            expand_input<false>(lines, position, values, pair[0]);
            expand_input<false>(lines, position + 1, values, pair[1]);
            uint32_t line[kPanelRows];
            for (int lane = 0; lane < kPanelRows; ++lane) {
                line[lane] = as_bits(pair[0][lane]) >> 16 | (as_bits(pair[1][lane]) & 0xffff0000);
            }
            std::memcpy(out, line, sizeof line);
        }
    }

 private:
    // One input of all 16 rows. `position` counts packed inputs.
    template <bool kIsScaled>
    static void expand_input(const uint8_t* panel, int64_t position, const GroupValues& values, float* out) {
        constexpr uint32_t kMask = static_cast<uint32_t>((uint64_t{1} << kBits) - 1);
        uint32_t line[kPanelRows];
        std::memcpy(line, panel + position / kInputsPerLine * kLineBytes, sizeof line);
        const int shift = F::shift(position);
        for (int lane = 0; lane < kPanelRows; ++lane) {
            const float value = F::decode(line[lane] >> shift & kMask, values.zero[lane]);
            out[lane] = kIsScaled ? value * values.scale[lane] : value;
        }
    }
};

}  // namespace
}  // namespace amalgam
