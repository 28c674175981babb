// Sums of chunks that a matrix unit has stored: vectors scale them and add them to the totals.
#pragma once

#include <algorithm>
#include <cstring>

#include "product/sums.h"
#include "product/unit_pieces.h"

namespace amalgam {
namespace {

using UnitSums = int32_t[kUnitRows][kPanelRows];  // or float32

// Rows [row, row + rows) of each panel's totals += added(panel, 0 …).
template <int kPanels, class Added>
inline void add_to_rows(Sums* totals, int64_t row, int64_t rows, Added&& added) {
    for (int64_t m = 0; m < rows; ++m) {
        Floats total[kPanels];
        for (int p = 0; p < kPanels; ++p) total[p] = add(load_floats(totals[p].row[row + m]), added(p, m));
        for (int p = 0; p < kPanels; ++p) store_floats(totals[p].row[row + m], total[p]);
    }
}

// The sums of a chunk, of up to two tiles of rows, which have not been added to their totals yet.
struct PendingSums {
    alignas(kLineBytes) UnitSums sums[2][2];  // tile, panel
    alignas(kLineBytes) Factors factors[2];   // copies: the piece may hold the next chunks' by then
    int64_t chunk = 0, row = 0;               // of the next tile
    int tile = 0, num_tiles = 0;

    // After the sums have been stored.
    void begin(const Piece& piece, int panels, int64_t of_chunk, int64_t first_row, int tiles) {
        for (int p = 0; p < panels; ++p) {
            std::memcpy(factors[p], piece.factors[p][of_chunk - piece.first], sizeof(Factors));
        }
        chunk = of_chunk;
        row = first_row;
        tile = 0;
        num_tiles = tiles;
    }
};

// Adds the tile to its totals, as int8_tile does.
template <int kPanels>
inline void add_integers(const PendingSums& pending, const Run (&run)[2], const UnitRows& x, int64_t rows,
                         Sums* totals) {
    const UnitSums* sums = pending.sums[pending.tile];
    const int64_t row = pending.row, of_rows = x.factors.at(pending.chunk, row);
    const int64_t group = pending.chunk / run[0].chunks_per_group;
    const float* row_scale = x.factors.scale.data() + of_rows;
    const int32_t* first = x.factors.first.data() + of_rows;
    Floats scale[kPanels], offset[kPanels];
    for (int p = 0; p < kPanels; ++p) {
        scale[p] = load_floats(pending.factors[p][0]);
        offset[p] = load_floats(pending.factors[p][1]);
    }
    const auto scaled_sum = [&](int p, int64_t m, const Ints& zeros) {
        const Floats factor = mul(scale[p], broadcast_float(row_scale + m));
        return mul(to_floats(add(load_ints(sums[p][m]), zeros)), factor);
    };
    if (run[0].zero == nullptr) {
        add_to_rows<kPanels>(totals, row, rows,
                             [&](int p, int64_t m) { return scaled_sum(p, m, broadcast_int(first[m])); });
    } else {
        add_to_rows<kPanels>(totals, row, rows, [&](int p, int64_t m) {
            return scaled_sum(p, m, zero_times(run[p].zero + group * kPanelRows, first[m]));
        });
    }
    if (run[0].offset == nullptr) return;
    const float* row_offset = x.factors.offset.data() + of_rows;
    add_to_rows<kPanels>(totals, row, rows,
                         [&](int p, int64_t m) { return mul(offset[p], broadcast_float(row_offset + m)); });
}

template <int kPanels>
inline void add_floats(const PendingSums& pending, int64_t rows, Sums* totals) {
    const UnitSums* sums = pending.sums[pending.tile];
    Floats scale[kPanels];
    for (int p = 0; p < kPanels; ++p) scale[p] = load_floats(pending.factors[p][0]);
    add_to_rows<kPanels>(totals, pending.row, rows, [&](int p, int64_t m) {
        return mul(load_floats(reinterpret_cast<const float*>(sums[p][m])), scale[p]);
    });
}

// Adds the next tile to its totals, if there is one.
template <Operand kOperand, int kPanels>
inline void add_next_tile(PendingSums& pending, const Piece& piece, const UnitRows& x, Sums* totals) {
    if (pending.tile == pending.num_tiles) return;
    const int64_t rows = std::min(x.height, x.rows - pending.row);
    if constexpr (kOperand == Operand::kInt8) {
        add_integers<kPanels>(pending, piece.run, x, rows, totals);
    } else {
        add_floats<kPanels>(pending, rows, totals);
    }
    pending.row += x.height;
    ++pending.tile;
}

}  // namespace
}  // namespace amalgam
