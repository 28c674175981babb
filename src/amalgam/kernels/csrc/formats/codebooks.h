// codebooks: neighbouring inputs of a row are the sum of a vector of each codebook (AQLM, Egiazarian et al. 2024),
// times the row's scale. In place of lines, a panel has codes as uint8 or, of more than 256 vectors, uint16:
//
//     [inputs / inputs of a vector, codebooks, 16 rows]
//
// The codebooks lie behind the scales as they are published. They are what a product reads most, from the cache. A
// code counts modulo the number of vectors, so that none reads outside.
#pragma once

#include "formats/format.h"

namespace amalgam {
namespace {

struct Codebooks : LineFormat<Codebooks, 16> {  // at most 16 bits a code
    static constexpr const char* kName = "codebooks";
    static constexpr Operand kOperand = Operand::kFloat32;
    static constexpr bool kHasScale = true, kIsCodebooks = true;

    static void expand_floats(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
        const bool is_wide = w.book_sizes.code_bytes() == 2;
        switch (w.book_sizes.dtype) {
            case DType::kFloat32:
                return (is_wide ? expand<uint16_t, DType::kFloat32> : expand<uint8_t, DType::kFloat32>)(w, panel, first,
                                                                                                        end, out);
            case DType::kBfloat16:
                return (is_wide ? expand<uint16_t, DType::kBfloat16>
                                : expand<uint8_t, DType::kBfloat16>)(w, panel, first, end, out);
            default:
                return (is_wide ? expand<uint16_t, DType::kFloat16> : expand<uint8_t, DType::kFloat16>)(w, panel, first,
                                                                                                        end, out);
        }
    }

 private:
    // Eight inputs of all rows: where their codes are, and where in a vector they begin.
    template <class Code>
    struct Eight {
        const Code* codes;
        int64_t offset;

        Eight(const Matrix& w, int64_t panel, int64_t input)
            : codes(reinterpret_cast<const Code*>(w.panel(panel)) +
                    input / w.book_sizes.inputs * w.book_sizes.number * kPanelRows),
              offset(input % w.book_sizes.inputs * (w.book_sizes.dtype == DType::kFloat32 ? 4 : 2)) {}
    };

    // 16 inputs at a time, row by row, and then the other way round; of the last eight, the second half is not used.
    template <class Code, DType kType>
    static void expand(const Matrix& w, int64_t panel, int64_t first, int64_t end, float* out) {
        const BookSizes& sizes = w.book_sizes;
        const int64_t vector_bytes = sizes.vector_bytes(), book_bytes = sizes.vectors * vector_bytes;
        const int64_t mask = sizes.vectors - 1;
        GroupValues values;
        values.load<Codebooks>(w, panel, 0);
        alignas(64) float rows[kPanelRows][kPanelRows], last[kPanelRows * kPanelRows];
        const float* from[kPanelRows];
        for (int row = 0; row < kPanelRows; ++row) from[row] = rows[row];
        for (int64_t input = first; input < end; input += kPanelRows, out += kPanelRows * kPanelRows) {
            const bool is_whole = input + kPanelRows <= end;
            const Eight<Code> a(w, panel, input), b(w, panel, is_whole ? input + kPanelRows / 2 : input);
            for (int row = 0; row < kPanelRows; ++row) {
                const auto chosen = [&](int64_t book) {
                    const int64_t at = book * kPanelRows + row;
                    const uint8_t* vectors = w.books + book * book_bytes;
                    return load_halves(vectors + (a.codes[at] & mask) * vector_bytes + a.offset,
                                       vectors + (b.codes[at] & mask) * vector_bytes + b.offset, kType);
                };
                Floats sum = chosen(0);
                for (int64_t book = 1; book < sizes.number; ++book) sum = add(sum, chosen(book));
                store_floats(rows[row], mul(sum, broadcast_float(values.scale + row)));
            }
            if (is_whole) {
                transpose(from, out, kPanelRows);
            } else {
                transpose(from, last, kPanelRows);
                std::memcpy(out, last, static_cast<size_t>((end - input) * kPanelRows) * sizeof(float));
            }
        }
    }
};

}  // namespace
}  // namespace amalgam
