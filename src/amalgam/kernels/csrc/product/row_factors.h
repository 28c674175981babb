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
        for (int64_t m = 0; m < rows; ++m) {
            const int64_t from = (x.index != nullptr ? x.index[first_row + m] : first_row + m) * num_chunks;
            for (int64_t i = 0; i < num_chunks; ++i) {
                const size_t to = static_cast<size_t>(at(i, m));
                scale[to] = x.scale[from + i];
                const int32_t sum = x.sum[from + i];
                if (!first.empty()) first[to] = -sum * (w.zero != nullptr ? 1 : zero);
                if (!offset.empty()) offset[to] = scale[to] * static_cast<float>(sum);
            }
        }
    }

    int64_t at(int64_t chunk, int64_t row) const { return chunk * rows + row; }
};

}  // namespace
}  // namespace amalgam
