// Products of int8 activations of many rows with several panels at once, where the instruction set has registers for
// it (kWidePanels in isa/). A word of activations is loaded once for all panels, and codes become bytes once for all
// rows: what limits a tile is how many instructions are issued.
//
//                    lines of bytes, of four panels      a line: 16 outputs × 4 inputs
//                   ┌──────┬──────┬──────┬──────┐
//      up to 6 rows │ sums │ sums │ sums │ sums │
//                   └──────┴──────┴──────┴──────┘
//
// Where parts have scales of their own, it is two panels: the sums of parts need as many registers again.
//
// A tile knows no format: the format widens a piece of each panel (formats/byte_lines.h). Order of accumulation: that
// of tiles.h and codes_tile.h, and so the same bits.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>
#include <vector>

#include "product/each.h"
#include "product/format_kernels.h"
#include "product/row_factors.h"
#include "product/sums.h"
#include "product/tile.h"

namespace amalgam {
namespace {

constexpr int kWideTile = 6, kMinWideTile = 4;  // rows: 8 and more can be cut into tiles of no other heights
static_assert(kMinWideRows >= 8 && kMinWidePartsRows >= 8);
constexpr int64_t kWideInputs = 1024;  // of all panels of a piece, which the first-level cache holds
constexpr int64_t kLeastChunk = kColumnUnit, kLeastPart = 16;

// Chunks [first, end) of kPanels panels.
template <int kPanels>
struct WidePiece {
    static constexpr int64_t kInputs = kWideInputs / kPanels;

    int64_t first, end;
    Run run[kPanels];
    const uint8_t* lines[kPanels];
    alignas(kLineBytes) float factors[kPanels][kInputs / kLeastChunk][2][kPanelRows];
    alignas(kLineBytes) int32_t part_first[kPanels][kInputs / kChunk][kPanelRows];
    alignas(kLineBytes) int32_t part_scales[kPanels][kInputs / kLeastPart][kPanelRows];
    alignas(kLineBytes) int16_t minima[kPanels][kInputs / kLeastPart / 2][2 * kPanelRows];
    alignas(kLineBytes) uint8_t bytes[kPanels][kInputs * kPanelRows];

    void make(const FormatKernels& format) {
        for (int p = 0; p < kPanels; ++p) {
            lines[p] = format.expand_bytes(run[p], {bytes[p], factors[p], part_first[p], part_scales[p], minima[p]});
        }
    }
};

// A block of rows.
class WideRows {
 public:
    const uint8_t* values[kMaxRows];
    RowFactors factors;
    std::vector<uint32_t> pairs;  // [pairs of parts, rows]: two int16, the sums of the parts

    WideRows(const Matrix& w, const Activations& x, int64_t first_row, int64_t rows, int32_t zero)
        : factors(w, x, first_row, rows, zero) {
        for (int64_t m = 0; m < rows; ++m) {
            values[m] = static_cast<const uint8_t*>(x.values) + x.row(first_row + m) * x.stride;
        }
        if (w.part == 0) return;
        make_unsigned(x);
        if (w.offset != nullptr) copy_pairs(x, first_row);
    }

    int64_t rows() const { return factors.rows; }

 private:
    static void flip_signs(const uint8_t* __restrict from, int64_t count, uint8_t* __restrict to) {
        for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(from[i] ^ 128);
    }

    // Values get 128 added, so that they are the unsigned operand, and codes the signed one.
    void make_unsigned(const Activations& x) {
        const int64_t stride = x.padded_columns + kLineBytes;  // or rows would fall into the same sets of the cache
        static thread_local std::vector<uint8_t> kept;
        if (kept.size() < static_cast<size_t>(rows() * stride)) kept.resize(static_cast<size_t>(rows() * stride));
        uint8_t* to = kept.data();
        for (int64_t m = 0; m < rows(); ++m, to += stride) {
            flip_signs(values[m], x.padded_columns, to);
            values[m] = to;
        }
    }

    void copy_pairs(const Activations& x, int64_t first_row) {
        const int64_t num_pairs = x.padded_columns / x.part / 2;
        pairs.resize(static_cast<size_t>(num_pairs * rows()));
        for (int64_t m = 0; m < rows(); ++m) {
            const int16_t* sums = x.part_sums + x.row(first_row + m) * num_pairs * 2;
            for (int64_t i = 0; i < num_pairs; ++i, sums += 2) {
                std::memcpy(pairs.data() + i * rows() + m, sums, sizeof pairs[0]);
            }
        }
    }
};

// Lines that are prefetched while a piece is computed: what comes after it, the same number with each chunk of each
// tile. The last lines may belong to nobody: that costs less than a branch that is guessed wrong.
template <int kPanels>
class WideAhead {
 public:
    WideAhead(const Matrix& w, int64_t panel, int64_t begin, int64_t end, int64_t num_times)
        : panel_bytes_(w.panel_bytes()),
          each_(((end - begin) / kLineBytes + num_times - 1) / num_times),
          next_(end < panel_bytes_ ? w.panel(panel) + end : w.panel(panel + kPanels)) {}

    void at_chunk() {
        for (int64_t i = 0; i < each_; ++i, next_ += kLineBytes) {
#pragma GCC unroll 8
            for (int p = 0; p < kPanels; ++p) prefetch_far(next_ + p * panel_bytes_);
        }
    }

 private:
    int64_t panel_bytes_, each_;
    const uint8_t* next_;
};

// M rows of a block with kPanels panels: sums in registers, totals in memory.
template <int M, int kPanels>
struct WideTile {
    const uint8_t* values[M];
    const uint8_t* lines[kPanels];
    float* total;  // of the first row and panel

    WideTile(const WidePiece<kPanels>& piece, const WideRows& x, int64_t first_row, Sums* totals)
        : total(totals->row[first_row]) {
        for (int m = 0; m < M; ++m) values[m] = x.values[first_row + m] + piece.first * piece.run[0].chunk;
        for (int p = 0; p < kPanels; ++p) lines[p] = piece.lines[p];
    }

    // sum += four inputs, from `at` on; kIsSigned: the lines are, not the rows.
    template <bool kIsSigned>
    void add_quad(int64_t at, Ints (*sum)[M]) const {
        Bytes w[kPanels];
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p) w[p] = load_bytes(lines[p] + at * kPanelRows);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Operand4 word = broadcast4(values[m] + at);
#pragma GCC unroll 8
            for (int p = 0; p < kPanels; ++p) {
                sum[p][m] = kIsSigned ? dot_bytes(sum[p][m], word, w[p]) : dot_bytes(sum[p][m], w[p], word);
            }
        }
    }

    // function(total of a row with a panel, panel, row).
    template <class Function>
    void each_total(Function&& function) const {
#pragma GCC unroll 8
        for (int p = 0; p < kPanels; ++p) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                float* to = total + p * static_cast<int64_t>(sizeof(Sums) / sizeof(float)) + m * kPanelRows;
                store_floats(to, function(load_floats(to), p, m));
            }
        }
    }
};

template <int M, int kPanels>
inline void clear(Ints (*sum)[M]) {
#pragma GCC unroll 32
    for (int i = 0; i < kPanels * M; ++i) sum[i / M][i % M] = broadcast_int(0);
}

// totals [kPanels][M rows] += M rows times a piece.
template <int M, int kPanels>
void multiply_wide(const WidePiece<kPanels>& piece, const WideRows& x, int64_t first_row, WideAhead<kPanels>& ahead,
                   Sums* totals) {
    const WideTile<M, kPanels> tile(piece, x, first_row, totals);
    const Run& run = piece.run[0];
    int64_t at = 0;
    for (int64_t chunk = piece.first, local = 0; chunk < piece.end; ++chunk, ++local) {
        ahead.at_chunk();
        const int64_t of_chunk = x.factors.at(chunk, first_row);
        const int32_t* first = x.factors.first.data() + of_chunk;
        Ints sum[kPanels][M];
        if (run.zero == nullptr) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const Ints same = broadcast_int(first[m]);
#pragma GCC unroll 8
                for (int p = 0; p < kPanels; ++p) sum[p][m] = same;
            }
        } else {
            const int64_t group = chunk / run.chunks_per_group;
#pragma GCC unroll 32
            for (int i = 0; i < kPanels * M; ++i) {
                sum[i / M][i % M] = zero_times(piece.run[i / M].zero + group * kPanelRows, first[i % M]);
            }
        }
        for (const int64_t end = at + run.inputs(chunk); at < end; at += 4) tile.template add_quad<false>(at, sum);
        const float* scale = x.factors.scale.data() + of_chunk;
        const auto& factors = piece.factors;
        tile.each_total([&](Floats total, int p, int m) {
            const Floats factor = mul(load_floats(factors[p][local][0]), broadcast_float(scale + m));
            return add(total, mul(to_floats(sum[p][m]), factor));
        });
        if (run.offset == nullptr) continue;
        const float* offset = x.factors.offset.data() + of_chunk;
        tile.each_total([&](Floats total, int p, int m) {
            return add(total, mul(load_floats(factors[p][local][1]), broadcast_float(offset + m)));
        });
    }
}

// The same where parts of kPart inputs have integer scales s[i]. One running sum S goes over all parts of a chunk. By
// summation by parts, the sum of s[i] (S[i] - S[i - 1]) is that of (s[i] - s[i + 1]) S[i], with a zero behind the last
// scale, so that no accumulator is cleared. part_scales holds these differences. Exact modulo 2^32.
template <int M, int kPanels, int kPart, bool kHasMinima>
void multiply_wide_parts(const WidePiece<kPanels>& piece, const WideRows& x, int64_t first_row,
                         WideAhead<kPanels>& ahead, Sums* totals) {
    constexpr int kParts = kChunk / kPart;
    const WideTile<M, kPanels> tile(piece, x, first_row, totals);
    const auto& factors = piece.factors;
    [[maybe_unused]] const uint32_t* pairs = x.pairs.data() + piece.first * (kParts / 2) * x.rows() + first_row;
    int64_t at = 0, part = 0;
    for (int64_t local = 0; local < piece.end - piece.first; ++local) {
        ahead.at_chunk();
        Ints sum[kPanels][M], running[kPanels][M];
        clear<M, kPanels>(running);
#pragma GCC unroll 32
        for (int i = 0; i < kPanels * M; ++i) sum[i / M][i % M] = load_ints(piece.part_first[i / M][local]);
        for (const int64_t end = part + kParts; part < end; ++part, at += kPart) {
            each<kPart / 4>([&](auto quad) { tile.template add_quad<true>(at + 4 * quad(), running); });
#pragma GCC unroll 8
            for (int p = 0; p < kPanels; ++p) {
                const Ints scale = load_ints(piece.part_scales[p][part]);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) sum[p][m] = add_in_place(sum[p][m], scaled(running[p][m], scale));
            }
        }
        if constexpr (kHasMinima) {
            Ints(&minima)[kPanels][M] = running;
            clear<M, kPanels>(minima);
            for (int64_t pair = part / 2 - kParts / 2; pair < part / 2; ++pair, pairs += x.rows()) {
                Pairs w[kPanels];
#pragma GCC unroll 8
                for (int p = 0; p < kPanels; ++p) {
                    w[p] = load_pairs(reinterpret_cast<const uint8_t*>(piece.minima[p][pair]));
                }
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m) {
                    const Operand4 word = broadcast4(pairs + m);
#pragma GCC unroll 8
                    for (int p = 0; p < kPanels; ++p) minima[p][m] = dot_words(minima[p][m], w[p], word);
                }
            }
        }
        const float* scale = x.factors.scale.data() + x.factors.at(piece.first + local, first_row);
        tile.each_total([&](Floats total, int p, int m) {
            const Floats of_row = broadcast_float(scale + m);
            total = add(total, mul(to_floats(sum[p][m]), mul(load_floats(factors[p][local][0]), of_row)));
            if constexpr (!kHasMinima) return total;
            return subtract(total, mul(to_floats(running[p][m]), mul(load_floats(factors[p][local][1]), of_row)));
        });
    }
}

template <int kPanels>
using WideFunction = void (*)(const WidePiece<kPanels>&, const WideRows&, int64_t first_row, WideAhead<kPanels>&,
                              Sums*);

// For kMinWideTile rows and more.
template <int kPanels, int kPart, bool kHasMinima, int... kMore>
WideFunction<kPanels> wide_function(int64_t rows, std::integer_sequence<int, kMore...>) {
    if constexpr (kPart == 0) {
        static constexpr WideFunction<kPanels> kByRows[] = {multiply_wide<kMinWideTile + kMore, kPanels>...};
        return kByRows[rows - kMinWideTile];
    } else {
        static constexpr WideFunction<kPanels> kByRows[] = {
            multiply_wide_parts<kMinWideTile + kMore, kPanels, kPart, kHasMinima>...};
        return kByRows[rows - kMinWideTile];
    }
}

// totals[i].row[r] = row r · panel + i, for kPanels panels.
template <int kPanels, int kPart, bool kHasMinima>
void wide_product(const Matrix& w, const WideRows& x, int64_t panel, Sums* totals) {
    const FormatKernels& format = kernels_of(w.format);
    WidePiece<kPanels> piece;
    for (int p = 0; p < kPanels; ++p) {
        piece.run[p] = whole_panel(w, format, Operand::kInt8, panel + p);
        std::memset(totals[p].row, 0, sizeof totals[p].row[0] * static_cast<size_t>(x.rows()));
    }
    const int64_t chunk = piece.run[0].chunk, num_chunks = piece.run[0].end_chunk;
    const int64_t step = std::max<int64_t>(1, piece.kInputs / chunk);
    const int64_t num_tiles = (x.rows() + kWideTile - 1) / kWideTile, height = x.rows() / num_tiles;
    const int64_t num_taller = x.rows() % num_tiles;  // tiles of a row more
    constexpr std::make_integer_sequence<int, kWideTile - kMinWideTile + 1> kHeights;
    const WideFunction<kPanels> multiply[] = {
        wide_function<kPanels, kPart, kHasMinima>(height, kHeights),
        wide_function<kPanels, kPart, kHasMinima>(height + (num_taller > 0), kHeights)};
    for (piece.first = 0; piece.first < num_chunks; piece.first = piece.end) {
        piece.end = std::min(piece.first + step, num_chunks);
        const int64_t begin = piece.first * chunk * w.bytes_per_input;
        const int64_t end = std::min(piece.end * chunk, w.padded_columns()) * w.bytes_per_input;
        for (int p = 0; p < kPanels; ++p) {
            piece.run[p].lines = w.panel(panel + p) + begin;
            piece.run[p].first_chunk = piece.first;
            piece.run[p].end_chunk = piece.end;
        }
        piece.make(format);
        WideAhead<kPanels> ahead(w, panel, begin, end, num_tiles * (piece.end - piece.first));
        for (int64_t tile = 0, row = 0; tile < num_tiles; ++tile) {
            const bool is_taller = tile < num_taller;
            multiply[is_taller](piece, x, row, ahead, totals);
            row += height + is_taller;
        }
    }
}

// How a block of rows is multiplied with several panels at once, if it is.
template <int kPanels = kWidePanels>
class WideBlock {
 public:
    WideBlock(const Matrix& w, const Activations& x, int64_t first_row, int64_t rows, bool is_wanted) : w_(w) {
        const FormatKernels& format = kernels_of(w.format);
        if (!is_wanted || x.kind != Operand::kInt8 || format.expand_bytes == nullptr) return;
        if (rows < (w.part > 0 ? kMinWidePartsRows : kMinWideRows)) return;
        constexpr int kHalf = kPanels / 2;
        const bool has_minima = w.offset != nullptr;
        panels_ = panels_of(w);
        if (w.part == 0) {
            function_ = wide_product<kPanels, 0, false>;
        } else if (w.part == 16) {
            function_ = has_minima ? wide_product<kHalf, 16, true> : wide_product<kHalf, 16, false>;
        } else {
            function_ = has_minima ? wide_product<kHalf, 32, true> : wide_product<kHalf, 32, false>;
        }
        rows_.emplace(w, x, first_row, rows, format.byte_zero);
    }

    // Of a weight with operands in int8, if there are rows enough.
    static int panels_of(const Matrix& w) {
        if (kernels_of(w.format).expand_bytes == nullptr) return 1;
        return w.part > 0 ? kPanels / 2 : kPanels;
    }
    int panels() const { return panels_; }  // 1: this block is not multiplied here
    // totals[i].row[r] = row r · panel + i, for as many panels.
    void multiply(int64_t panel, Sums* totals) const { function_(w_, *rows_, panel, totals); }

 private:
    const Matrix& w_;
    int panels_ = 1;
    void (*function_)(const Matrix&, const WideRows&, int64_t, Sums*) = nullptr;
    std::optional<WideRows> rows_;
};

template <>
class WideBlock<1> {
 public:
    WideBlock(const Matrix&, const Activations&, int64_t, int64_t, bool) {}
    static int panels_of(const Matrix&) { return 1; }
    int panels() const { return 1; }
    void multiply(int64_t, Sums*) const {}
};

}  // namespace
}  // namespace amalgam
