// What belongs to the chunks of a block of int8 rows, laid out by chunks, so that the rows of a tile find theirs at one
// address: products of many rows (wide.h, unit.h) read it once for every panel.
#pragma once

#include <vector>

#include "product/kernels.h"

namespace amalgam {
namespace {

struct RowFactors {
    int64_t rows = 0;
    std::vector<float> scale;    // [chunks, rows]
    std::vector<int32_t> first;  // [chunks, rows]: what is added to a chunk's sum, or what zero points multiply
    std::vector<float> offset;   // [chunks, rows]: what the groups' offsets multiply

    RowFactors() = default;

    // zero: that of the codes, where the weight has none for each group. `first` and `offset` are only there for
    // weights without parts, `offset` only where the weight has one.
    RowFactors(const Matrix& w, const Activations& x, int64_t first_row, int64_t count, int32_t zero) : rows(count) {
        const int64_t num_chunks = (x.padded_columns + x.chunk - 1) / x.chunk;
        scale.resize(static_cast<size_t>(num_chunks * rows));
        if (w.part == 0) first.resize(scale.size());
        if (w.part == 0 && w.offset != nullptr) offset.resize(scale.size());
        for (size_t chunk = 0, to = 0; chunk < static_cast<size_t>(num_chunks); ++chunk) {
            for (int64_t m = first_row; m < first_row + rows; ++m, ++to) {
                const int64_t from = x.row(m) * num_chunks + static_cast<int64_t>(chunk);
                scale[to] = x.scale[from];
                const int32_t sum = x.sum[from];
                if (!first.empty()) first[to] = -sum * (w.zero != nullptr ? 1 : zero);
                if (!offset.empty()) offset[to] = scale[to] * static_cast<float>(sum);
            }
        }
    }

    int64_t at(int64_t chunk, int64_t row) const { return chunk * rows + row; }
};

}  // namespace
}  // namespace amalgam
