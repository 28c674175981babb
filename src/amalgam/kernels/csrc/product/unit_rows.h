// What a matrix unit multiplies of activations: a weight's inputs as steps, rows as tiles.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "product/format_kernels.h"
#include "product/row_factors.h"
#include "product/unit_tiles.h"

namespace amalgam {
namespace {

// A weight's inputs as steps. Chunks that do not end with a step are padded with zeros, in copies.
struct Steps {
    int64_t inputs;  // of a step
    int64_t chunk;   // inputs
    int64_t padded_columns, num_chunks;
    int64_t per_chunk, total;  // steps
    bool is_padded;

    Steps(const Matrix& w, Operand operand)
        : inputs(kLineBytes / operand_bytes(operand)),
          chunk(accumulation_chunk(w, operand)),
          padded_columns(w.padded_columns()),
          num_chunks((padded_columns + chunk - 1) / chunk),
          per_chunk((chunk + inputs - 1) / inputs),
          total((num_chunks - 1) * per_chunk + (padded_columns - (num_chunks - 1) * chunk + inputs - 1) / inputs),
          is_padded(chunk % inputs != 0 || padded_columns % inputs != 0) {}

    int64_t first_input(int64_t chunk_index) const { return std::min(chunk_index * chunk, padded_columns); }
    int64_t first_step(int64_t chunk_index) const { return std::min(chunk_index * per_chunk, total); }
};

// This thread's memory for rows that have to be copied.
inline uint8_t* row_memory(int64_t num_lines) {
    struct Line {
        alignas(kLineBytes) uint8_t bytes[kLineBytes];
    };
    static thread_local std::vector<Line> kept;
    if (kept.size() < static_cast<size_t>(num_lines)) kept.resize(static_cast<size_t>(num_lines));
    return kept.front().bytes;
}

// Rows of activations as tiles of equal height: [tiles × height] rows at equal distances, each step from 64 × its
// number bytes on. The last tile may reach into rows that nobody asked for, whose sums nobody reads.
struct UnitRows {
    int64_t rows, num_tiles, height;
    const uint8_t* values;
    int64_t stride;      // bytes
    RowFactors factors;  // of int8 rows

    UnitRows(const Matrix& w, const Steps& steps, const Activations& x, int64_t first_row, int64_t count)
        : rows(count), num_tiles(RowTiles(count).count), height(RowTiles(count).height) {
        if (x.kind == Operand::kInt8) factors = {w, x, first_row, count, kernels_of(w.format).byte_zero};
        const int64_t bytes = operand_bytes(x.kind);
        const auto row_at = [&](int64_t m) {
            return static_cast<const uint8_t*>(x.values) + x.row(first_row + m) * x.stride * bytes;
        };
        if (!steps.is_padded && (x.index == nullptr || rows == 1)) {
            values = row_at(0);
            stride = x.stride * bytes;
            return;
        }
        // A line more than they need: rows of a power of two would all fall into the same sets of the cache.
        const int64_t num_lines = steps.total + 1;
        uint8_t* to = row_memory(num_lines * num_tiles * height);
        values = to;
        stride = num_lines * kLineBytes;
        for (int64_t m = 0; m < rows; ++m, to += stride) {
            const uint8_t* from = row_at(m);
            if (!steps.is_padded) {
                std::memcpy(to, from, static_cast<size_t>(steps.padded_columns * bytes));
                continue;
            }
            std::memset(to, 0, static_cast<size_t>(stride));
            for (int64_t chunk = 0; chunk < steps.num_chunks; ++chunk) {
                const int64_t first = steps.first_input(chunk) * bytes, end = steps.first_input(chunk + 1) * bytes;
                std::memcpy(to + steps.first_step(chunk) * kLineBytes, from + first, static_cast<size_t>(end - first));
            }
        }
    }
};

}  // namespace
}  // namespace amalgam
