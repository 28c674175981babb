// float_table4: nibbles that look up one of 16 floats, which products round to bfloat16 (NF4 and FP4, Dettmers et al.
// 2023). The table lies behind the scales, as in table4.h.
//
// A line has 8 inputs of the panel's rows, i0 to i3 in low nibbles and i4 to i7 in high ones, in the order of the
// nibbles of bf16_coded.h: two tables of bytes and an interleaving make bfloat16 pairs.
#pragma once

#include "formats/format.h"

namespace amalgam {
namespace {

struct FloatTable4 : LineFormat<FloatTable4, 4> {
    static constexpr const char* kName = "float_table4";
    static constexpr Operand kOperand = Operand::kBfloat16;
    static constexpr bool kHasScale = true, kIsTable = true, kIsBytes = true;
    static constexpr int64_t kDirectRows = kTileRows;
    static constexpr int kLinesPerStep = 1, kPartsPerStep = 2;

    struct Lines {
        static constexpr int kStep = 8, kLines = 1;
        static void write(const uint8_t* codes, uint32_t* lane) {
            // `lane` counts words from a line's beginning on.
            const auto address = reinterpret_cast<uintptr_t>(lane);
            auto* line = reinterpret_cast<uint8_t*>(address / kLineBytes * kLineBytes);
            const int row = static_cast<int>(address % kLineBytes / sizeof(uint32_t));
            for (int i = 0; i < 4; ++i) {
                line[place(row, i)] = static_cast<uint8_t>(codes[i] | codes[i + 4] << 4);
            }
        }
    };
    static void read_codes(const uint8_t* panel, int64_t position, uint32_t* codes) {
        const uint8_t* line = panel + position / 8 * kLineBytes;
        const int input = static_cast<int>(position % 8);
        for (int lane = 0; lane < kPanelRows; ++lane) codes[lane] = line[place(lane, input % 4)] >> input / 4 * 4 & 15;
    }

    // High and low bytes of the table's values.
    static Codes codes_of(const Matrix& w) {
        alignas(16) uint8_t high[16], low[16];
        for (int code = 0; code < 16; ++code) {
            const uint16_t bits = bfloat16_bits(w.table[code]);
            high[code] = static_cast<uint8_t>(bits >> 8);
            low[code] = static_cast<uint8_t>(bits);
        }
        return load_codes(high, low);
    }

    struct Loader {
        explicit Loader(const Run& run) : codes(codes_of(*run.weight)) {}
        void load(const uint8_t* line, int part, Pairs& first, Pairs& second) const {
            load_looked_up(line, part, codes, first, second);
        }
        Codes codes;
    };

    static void expand_pairs(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
        if (w.is_scaled_by_value()) return LineFormat<FloatTable4, 4>::expand_pairs(w, panel, first, end, out);
        const Codes codes = codes_of(w);
        const uint8_t* line = w.panel(panel) + first / 8 * kLineBytes;
        for (int64_t input = first; input < end; input += 8, line += kLineBytes) {
            for (int half = 0; half < 2; ++half, out += 2 * kLineBytes) {
                Pairs low, high;
                load_looked_up(line, half, codes, low, high);
                store_pairs(out, low);
                store_pairs(out + kLineBytes, high);
            }
        }
    }

 private:
    // The byte of a row's input i or i + 4, i below 4.
    static constexpr int place(int row, int i) { return row / 4 * 16 + row % 4 * 2 + i / 2 * 8 + i % 2; }
};

}  // namespace
}  // namespace amalgam
