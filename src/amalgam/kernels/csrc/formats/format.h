// What a weight format says of itself, and what follows from it.
//
// A format is a class without data that derives from LineFormat and has a line in table.h. Its lines are multiplied
// with one kind of operand, kOperand; for any other they are expanded, into lines of bf16.h or fp32.h.
#pragma once

#include <cstring>
#include <limits>
#include <type_traits>

#include "formats/quads.h"
#include "isa/isa.h"
#include "product/matrix.h"
#include "product/tile.h"

namespace amalgam {
namespace {

constexpr int64_t kAnyRows = std::numeric_limits<int64_t>::max();

// F: the format itself, which redefines what is different and adds
//
//     kName         as Python knows it
//     kOperand      what its lines are multiplied with
//     shift(p)      how far input p of a line is shifted left within its lane
//     decode(code, zero)   the value of a code, unscaled
//
// and, where kDirectRows is not 0, for int8 operands kDotsPerLine, first_sum and add_line and, of fewer than 8 bits,
// Lines and Loader (codes.h; lines of 8 bits are unsigned bytes, four inputs to a lane), for bfloat16 operands
// kLinesPerStep, kPartsPerStep and Loader (tiles.h).
template <class F, int kBitsPerInput>
struct LineFormat {
    static constexpr int kBits = kBitsPerInput;
    static constexpr int kBytesPerInput = kBits * kPanelRows / 8;  // of all rows of a panel
    static constexpr int kInputsPerLine = kLineBytes / kBytesPerInput;
    static constexpr int kColumns = kColumnUnit;  // inputs are padded to a multiple
    static constexpr bool kHasScale = false, kTakesZero = false, kTakesOffset = false, kTakesOrder = false;
    static constexpr int kZero = 0;          // what is subtracted from every code where the weight has no zero points
    static constexpr bool kIsTable = false;  // whether codes look up Matrix::table
    static constexpr bool kIsCodebooks = false;      // whether codes look up vectors (codebooks.h)
    static constexpr bool kIsCodes = false;          // whether quads of codes are multiplied (codes.h)
    static constexpr int kChainRows = 0;             // so many rows at most are multiplied by add_line all the same
    static constexpr bool kIsBytes = false;          // whether it is packed from a byte for each code
    static constexpr int kPart = 0, kPairBytes = 0;  // nested.h
    static constexpr float kScaleFactor = 1.0f;      // what loaded or expanded pairs lack; their scale makes up for it
    static constexpr int64_t kDirectRows = 0;        // most rows that multiply the lines as they are, unexpanded
    static constexpr bool kHasExceptions = false;    // whether lines leave something out, which add_exceptions adds
    using Quads = void;                              // how four codes of all rows are read at a time (quads.h)

    // --- Packing ---

    // Four bytes of a row → one lane of a line.
    static uint32_t encode(uint32_t word) { return word; }
    // Not 0 where lines cannot hold the word.
    static uint32_t unpackable(uint32_t) { return 0; }

    // --- Expanding ---

    // Inputs [first, end) of a panel as floats [end - first, 16]: the weight's exact values.
    static void expand_floats(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
        const uint8_t* lines = w.panel(panel);
        const int64_t shared = F::kPart > 0 ? F::kPart : w.group;
        GroupValues values;
        for (int64_t input = first; input < end; ++input, out += kPanelRows) {
            if (input >= w.columns) {
                std::memset(out, 0, sizeof(float) * kPanelRows);
                continue;
            }
            const int64_t position = w.position != nullptr ? w.position[input] : input;
            if constexpr (F::kHasScale) {
                const int64_t offset = position - values.index * shared;
                if (values.index < 0 || offset < 0 || offset >= shared) {
                    values.template load<F>(w, panel, position / shared);
                }
            }
            expand_input<F::kHasScale>(w, lines, position, values, out);
        }
    }

    // Packed inputs [first, end) of a panel as the lines of a bf16 panel: unscaled, and integers below 256 are exact;
    // or values that are rounded, where the weight is_scaled_by_value.
    static void expand_pairs(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
        if constexpr (!std::is_void_v<typename F::Quads>) {
            const int64_t rest = expand_quads<F>(w, panel, first, end, out);
            out += (rest - first) / 2 * kLineBytes;
            first = rest;
        }
        const uint8_t* lines = w.panel(panel);
        const bool is_scaled = w.is_scaled_by_value();
        const int64_t shared = F::kPart > 0 ? F::kPart : w.group;
        GroupValues values;
        for (int64_t position = first; position < end; position += 2, out += kLineBytes) {
            alignas(64) float pair[2][kPanelRows] = {};
            for (int i = 0; i < 2; ++i) {
                if (position + i >= w.columns) continue;
                if constexpr (F::kHasScale) {
                    const int64_t offset = position + i - values.index * shared;
                    if (values.index < 0 || offset < 0 || offset >= shared) {
                        values.template load<F>(w, panel, (position + i) / shared);
                    }
                }
                if (F::kHasScale && is_scaled) {
                    expand_input<F::kHasScale>(w, lines, position + i, values, pair[i]);
                } else {
                    expand_input<false>(w, lines, position + i, values, pair[i]);
                }
            }
            uint32_t line[kPanelRows];
            for (int lane = 0; lane < kPanelRows; ++lane) {
                line[lane] = bfloat16_bits(pair[0][lane]) | uint32_t{bfloat16_bits(pair[1][lane])} << 16;
            }
            std::memcpy(out, line, sizeof line);
        }
    }

    // The codes of one input of all 16 rows. `position` counts packed inputs.
    static void read_codes(const uint8_t* panel, int64_t position, uint32_t* codes) {
        constexpr uint32_t kMask = static_cast<uint32_t>((uint64_t{1} << kBits) - 1);
        uint32_t line[kPanelRows];
        std::memcpy(line, panel + position / kInputsPerLine * kLineBytes, sizeof line);
        const int shift = F::shift(position);
        for (int lane = 0; lane < kPanelRows; ++lane) codes[lane] = line[lane] >> shift & kMask;
    }

 private:
    template <bool kIsScaled>
    static void expand_input(const Matrix& w, const uint8_t* panel, int64_t position, const GroupValues& values,
                             float* out) {
        uint32_t codes[kPanelRows];
        F::read_codes(panel, position, codes);
        if (F::kTakesOffset && kIsScaled && w.offset_kind == Offset::kMinimum) {
            for (int lane = 0; lane < kPanelRows; ++lane) {
                const float value = static_cast<float>(static_cast<int32_t>(codes[lane]));
                out[lane] = value * values.scale[lane] + values.minimum[lane];
            }
            return;
        }
        for (int lane = 0; lane < kPanelRows; ++lane) {
            float value;
            if constexpr (F::kIsTable) {
                value = w.table[codes[lane]];
            } else {
                value = F::decode(codes[lane], values.zero[lane]);
            }
            out[lane] = kIsScaled ? value * values.scale[lane] : value;
        }
    }
};

}  // namespace
}  // namespace amalgam
