// Products on a matrix unit: up to two tiles of rows of activations times two panels at once (unit_tiles.h).
//
// Sixteen lines of a bf16 panel are a tile as they lie, and so are those of an int8 panel, as unsigned bytes. Other
// formats are expanded, a piece at a time for all rows (unit_pieces.h). Vectors scale the sums of chunks and add them
// to the totals: the sums wait in memory until the unit works on the next chunk (unit_sums.h).
//
// Order of accumulation of every output element. int8: that of tiles.h, so the result has the same bits; blocks of few
// rows use the vector loops. bfloat16, for any number of rows: products are added one step after the other, from zero.
// A scale of the whole panel multiplies the final sum; otherwise each chunk is summed from zero, multiplied by its
// scale and added to the total.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "product/unit_pieces.h"
#include "product/unit_rows.h"
#include "product/unit_sums.h"

namespace amalgam {
namespace {

// See UnitKernels.
struct UnitChoices {
    int64_t int8_rows = kTileRows + 1;
    bool scales_weights = false;
};
UnitChoices unit_choices;

// Multiplies kTiles tiles of rows, from first_row on, by a piece of kPanels panels, and adds to the totals. With
// adds_by_chunk each chunk's sums become `pending`, and those of the chunk before are added meanwhile.
template <class Unit, Operand kOperand, int kTiles, int kPanels>
void multiply_tiles(const Steps& steps, const UnitRows& x, int64_t first_row, Piece& piece, bool adds_by_chunk,
                    PendingSums& pending, Sums* totals) {
    const uint8_t* a[2] = {x.values + first_row * x.stride + steps.first_step(piece.first) * kLineBytes};
    a[1] = a[0] + x.height * x.stride;
    const uint8_t* b[2] = {piece.lines[0], piece.lines[1]};
    const auto step = [&] {
        multiply_step<Unit, kOperand, kTiles, kPanels>(a, x.stride, b, kLineBytes);
        for (int i = 0; i < kPanels; ++i) piece.cursor[i].at_step();
        for (const uint8_t*& tile : a) tile += kLineBytes;
        for (const uint8_t*& tile : b) tile += kStepBytes;
    };
    if (!adds_by_chunk) {
        const auto rows_of = [&](int tile, int panel) { return totals[panel].row[first_row + tile * x.height]; };
        each_sum<kTiles, kPanels>(
            [&](auto sum, int tile, int panel) { Unit::template load<sum()>(rows_of(tile, panel), kLineBytes); });
        for (int64_t i = steps.first_step(piece.first); i < steps.first_step(piece.end); ++i) step();
        each_sum<kTiles, kPanels>(
            [&](auto sum, int tile, int panel) { Unit::template store<sum()>(rows_of(tile, panel), kLineBytes); });
        return;
    }
    for (int64_t chunk = piece.first; chunk < piece.end; ++chunk) {
        each_sum<kTiles, kPanels>([&](auto sum, int, int) { Unit::template zero<sum()>(); });
        for (int64_t i = steps.first_step(chunk); i < steps.first_step(chunk + 1); ++i) {
            step();
            add_next_tile<kOperand, kPanels>(pending, piece, x, totals);
        }
        add_next_tile<kOperand, kPanels>(pending, piece, x, totals);  // chunks of a single step leave one of two tiles
        each_sum<kTiles, kPanels>(
            [&](auto sum, int tile, int panel) { Unit::template store<sum()>(pending.sums[tile][panel], kLineBytes); });
        pending.begin(piece, kPanels, chunk, first_row, kTiles);
    }
}

// totals[i].row[r] = row r · panel + i, for kPanels panels.
template <class Unit, Operand kOperand, int kPanels>
void multiply_panels(const Matrix& w, const Steps& steps, const UnitRows& x, int64_t panel, Sums* totals) {
    alignas(kLineBytes) uint8_t expanded[2][kMaxPieceSteps * kStepBytes];
    Piece piece{};
    PendingSums pending;
    for (int i = 0; i < kPanels; ++i) {
        piece.run[i] = whole_panel(w, kernels_of(w.format), kOperand, panel + i);
        std::memset(totals[i].row, 0, sizeof totals[i].row[0] * static_cast<size_t>(x.num_tiles * x.height));
    }
    const bool has_scale = piece.run[0].scale != nullptr;
    const bool has_groups = has_scale && w.num_groups > 1;
    const bool scales_lines = kOperand == Operand::kBfloat16 && has_groups && unit_choices.scales_weights;
    const bool adds_by_chunk = kOperand == Operand::kInt8 || (has_groups && !scales_lines);
    const int64_t num_pairs = (x.num_tiles + 1) / 2;
    // With few rows pieces are short, so that expanding and prefetching alternate.
    const int64_t most_steps = x.num_tiles == 1 ? steps.per_chunk : kMaxPieceSteps;
    const int64_t chunks = std::max<int64_t>(1, most_steps / steps.per_chunk);
    constexpr auto lines_of = kOperand == Operand::kInt8 ? byte_lines : pair_lines;
    const auto offset = [&](int64_t chunk) { return steps.first_input(chunk) * w.bytes_per_input; };
    for (piece.first = 0; piece.first < steps.num_chunks; piece.first = piece.end) {
        piece.end = std::min(piece.first + chunks, steps.num_chunks);
        for (int i = 0; i < kPanels; ++i) {
            Run& run = piece.run[i];
            run.lines = w.panel(panel + i) + offset(piece.first);
            run.first_chunk = piece.first;
            run.end_chunk = piece.end;
            piece.lines[i] = lines_of(w, steps, run, expanded[i], piece.factors[i]);
            if (!scales_lines) continue;
            for (int64_t chunk = piece.first; chunk < piece.end; ++chunk) {
                const int64_t at = chunk - piece.first;
                scale_pairs(piece.factors[i][at][0], steps.first_step(chunk + 1) - steps.first_step(chunk),
                            expanded[i] + at * steps.per_chunk * kStepBytes);
            }
        }
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
            for (int i = 0; i < kPanels; ++i) {
                piece.cursor[i] =
                    prefetch_cursor(w, panel + i, offset(piece.first), offset(piece.end), x.num_tiles, pair);
            }
            const auto multiply = 2 * pair + 1 < x.num_tiles ? multiply_tiles<Unit, kOperand, 2, kPanels>
                                                             : multiply_tiles<Unit, kOperand, 1, kPanels>;
            multiply(steps, x, 2 * pair * x.height, piece, adds_by_chunk, pending, totals);
        }
    }
    while (pending.tile < pending.num_tiles) add_next_tile<kOperand, kPanels>(pending, piece, x, totals);
    if (has_scale && !has_groups && !adds_by_chunk) {
        for (int i = 0; i < kPanels; ++i) {
            const Floats scale = load_scale(piece.run[i], 0);
            for (int64_t m = 0; m < x.rows; ++m) {
                store_floats(totals[i].row[m], mul(load_floats(totals[i].row[m]), scale));
            }
        }
    }
}

// A block of at most kMaxRows rows on the matrix unit; without one, nothing.
template <class Unit, bool = Unit::kExists>
class UnitBlock {
 public:
    UnitBlock(const Matrix&, const Activations&, int64_t, int64_t) {}
    bool is_used() const { return false; }
    void multiply(int64_t, int, Sums*) const {}
};

// Others use the unit too: it is taken and given back with each block.
template <class Unit>
class UnitBlock<Unit, true> {
 public:
    UnitBlock(const Matrix& w, const Activations& x, int64_t first_row, int64_t rows) : w_(w), steps_(w, x.kind) {
        if (x.kind == Operand::kBfloat16) {
            use<Operand::kBfloat16>();
        } else if (x.kind == Operand::kInt8 && rows >= unit_choices.int8_rows && w.part == 0) {
            use<Operand::kInt8>();
        }
        if (!is_used()) return;
        rows_.emplace(w, steps_, x, first_row, rows);
        Unit::configure(static_cast<int>(rows_->height));
    }
    ~UnitBlock() {
        if (is_used()) Unit::release();
    }
    UnitBlock(const UnitBlock&) = delete;
    UnitBlock& operator=(const UnitBlock&) = delete;

    bool is_used() const { return functions_[0] != nullptr; }
    // totals[i].row[r] = row r · panel + i, for `count` panels, but for what the format leaves to add_exceptions.
    void multiply(int64_t panel, int count, Sums* totals) const {
        functions_[count - 1](w_, steps_, *rows_, panel, totals);
    }

 private:
    template <Operand kOperand>
    void use() {
        functions_[0] = multiply_panels<Unit, kOperand, 1>;
        functions_[1] = multiply_panels<Unit, kOperand, 2>;
    }

    const Matrix& w_;
    Steps steps_;
    void (*functions_[2])(const Matrix&, const Steps&, const UnitRows&, int64_t panel, Sums*) = {};  // by panels
    std::optional<UnitRows> rows_;
};

}  // namespace
}  // namespace amalgam
