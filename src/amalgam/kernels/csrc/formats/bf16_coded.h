// bf16_coded: bfloat16 in 12 bits, without loss.
//
// Trained weights use few exponents: nearly all of a panel's are among 15 that follow each other, its window (the
// observation of DFloat11, Zhang et al. 2025, which codes exponents in a variable number of bits). A value is stored as
// a byte of sign and mantissa and a nibble with the place of its exponent in the window, from 1 on; 0 stands for zero.
// The rest, one value in a few thousand, are exceptions: zero in the panel, and multiplied one by one.
//
// 8 inputs i0 to i7 of the panel's rows take three lines: sign and mantissa of i0 to i3, then of i4 to i7, then the
// nibbles, low ones for i0 to i3. Within a line, rows 4q to 4q + 3 share the bytes 16q to 16q + 15:
//
//     i0 i1 of the four rows, one after the other, then i2 i3 of each
//
// so that interleaving with the high bytes makes bfloat16 pairs. Two tables give what a nibble adds to both bytes.
#pragma once

#include <algorithm>

#include "formats/format.h"
#include "product/kernels.h"

namespace amalgam {
namespace {

struct CodedBf16 : LineFormat<CodedBf16, 12> {
    static constexpr const char* kName = "bf16_coded";
    static constexpr Operand kOperand = Operand::kBfloat16;
    static constexpr int64_t kDirectRows = kDirectCodedRows;
    static constexpr bool kHasExceptions = true;
    static constexpr int kLinesPerStep = 3, kPartsPerStep = 2;

    // The tables of a window that begins after exponent `window`: entry c is of exponent window + c.
    static Codes codes_of(uint8_t window) {
        alignas(16) uint8_t high[16] = {}, low[16] = {};
        for (int code = 1; code < 16; ++code) {
            high[code] = static_cast<uint8_t>((window + code) >> 1);
            low[code] = static_cast<uint8_t>((window + code) << 7);
        }
        return load_codes(high, low);
    }

    struct Loader {
        explicit Loader(const Run& run) : codes(codes_of(run.weight->windows[run.panel])) {}
        void load(const uint8_t* line, int part, Pairs& first, Pairs& second) const {
            load_coded(line, part, codes, first, second);
        }
        Codes codes;
    };

    // But for exceptions, which are zero. Multiples of 8.
    static void expand_pairs(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
        const Codes codes = codes_of(w.windows[panel]);
        const uint8_t* line = w.panel(panel) + first * kBytesPerInput;
        for (int64_t input = first; input < end; input += 8, line += 3 * kLineBytes) {
            for (int half = 0; half < 2; ++half, out += 2 * kLineBytes) {
                Pairs low, high;
                load_coded(line, half, codes, low, high);
                store_pairs(out, low);
                store_pairs(out + kLineBytes, high);
            }
        }
    }

    static void expand_floats(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
        alignas(64) uint32_t pairs[4][kPanelRows];
        for (int64_t input = first / kColumnUnit * kColumnUnit; input < end; input += kColumnUnit) {
            expand_pairs(w, panel, input, input + kColumnUnit, reinterpret_cast<uint8_t*>(pairs));
            for (int64_t i = std::max(first, input); i < std::min(end, input + kColumnUnit); ++i) {
                const uint32_t* pair = pairs[(i - input) / 2];
                const int shift = i % 2 == 0 ? 16 : 0;
                float* to = out + (i - first) * kPanelRows;
                for (int lane = 0; lane < kPanelRows; ++lane) to[lane] = as_float(pair[lane] << shift & 0xffff0000);
            }
        }
        const Exception* last = w.exceptions + w.exception_starts[panel + 1];
        const Exception* found =
            std::lower_bound(w.exceptions + w.exception_starts[panel], last, first,
                             [](const Exception& exception, int64_t column) { return exception.column < column; });
        for (; found < last && found->column < end; ++found) {
            if (found->column < first) continue;  // nobody vouches for the order in a file
            out[(found->column - first) * kPanelRows + found->lane] = widen(Bfloat16{found->bits});
        }
    }

    // sums[row][lane] += what a panel's exceptions add to `rows` rows of bfloat16 activations.
    static void add_exceptions(const Matrix& w, int64_t panel, const Activations& x, int64_t first_row, int64_t rows,
                               float (*sums)[kPanelRows]) {
        const int32_t begin = w.exception_starts[panel], end = w.exception_starts[panel + 1];
        for (int64_t m = 0; m < rows; ++m) {
            const int64_t row = x.row(first_row + m);
            const auto* values = static_cast<const Bfloat16*>(x.values) + row * x.stride;
            for (int32_t i = begin; i < end; ++i) {
                const Exception& exception = w.exceptions[i];
                sums[m][exception.lane] += widen(Bfloat16{exception.bits}) * widen(values[exception.column]);
            }
        }
    }
};

}  // namespace
}  // namespace amalgam
