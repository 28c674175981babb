// Products on a matrix unit: up to two tiles of rows of activations times two panels at once (unit_tiles.h).
//
// Sixteen lines of a bf16 panel are a tile as they lie, those of an int8 panel too, as unsigned bytes; other formats
// are expanded, a piece at a time for all rows. Sums of chunks, which vectors scale and add up, wait in memory until
// the unit has the next chunk's products to work on.
//
// Order of accumulation of every output element. int8: that of tiles.h, and so the same bits; few rows stay with the
// vector loops. bfloat16, for any number of rows: the steps' sums one after the other, from zero; a scale for the whole
// panel multiplies the total, others multiply each chunk's sum (from zero) before it joins the total.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "product/format_kernels.h"
#include "product/row_factors.h"
#include "product/sums.h"
#include "product/unit_tiles.h"

namespace amalgam {
namespace {

constexpr int64_t kStepBytes = kPanelRows * kLineBytes;  // of a panel
constexpr int64_t kMaxPieceSteps = 8;        // whose lines, of two panels, are in the first-level cache together
constexpr int64_t kFewRowsAhead = 8 * 1024;  // bytes of a panel that are prefetched where nothing else takes time

// See UnitKernels.
struct UnitChoices {
    int64_t int8_rows = kTileRows + 1;
    bool scales_weights = false;
};
UnitChoices unit_choices;

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
        const auto row_of = [&](int64_t m) { return x.index != nullptr ? x.index[first_row + m] : first_row + m; };
        const auto row_at = [&](int64_t m) {
            return static_cast<const uint8_t*>(x.values) + row_of(m) * x.stride * bytes;
        };
        if (!steps.is_padded && (x.index == nullptr || rows == 1)) {
            values = row_at(0);
            stride = x.stride * bytes;
            return;
        }
        // A line in between, or rows whose length is a power of two would fall on the same lines of the cache.
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

// Lines that are prefetched while steps are computed: with each, as many as one reads.
struct Ahead {
    const uint8_t* next;
    int64_t left;

    void at_step() {
        const int64_t count = std::min<int64_t>(left, kPanelRows);
        for (int64_t i = 0; i < count; ++i, next += kLineBytes) prefetch_far(next);
        left -= count;
    }
};

// What a pair of tiles prefetches while it is multiplied by bytes [begin, end) of a panel: its share of what comes
// next; with few rows, which take less time than memory, what comes some way on.
inline Ahead ahead_of(const Matrix& w, int64_t panel, int64_t begin, int64_t end, int64_t num_tiles, int64_t pair) {
    const int64_t sharers = std::min<int64_t>((num_tiles + 1) / 2, kMaxSharers);
    const int64_t lines = (end - begin + kLineBytes - 1) / kLineBytes, share = (lines + sharers - 1) / sharers;
    if (pair >= sharers) return {};
    const int64_t at = num_tiles == 1 ? begin + kFewRowsAhead : end, left = at - w.panel_bytes();
    const uint8_t* from = left < 0 ? w.panel(panel) + at : w.panel(panel + MatrixUnit<>::kPanels) + left;
    return {from + pair * share * kLineBytes, share};
}

using Factors = float[2][kPanelRows];             // of a chunk: its group's scale and offset
using UnitSums = int32_t[kUnitRows][kPanelRows];  // or float32

// Chunks [first, end) of one or two panels.
struct Piece {
    int64_t first, end;
    Run run[2];
    const uint8_t* lines[2];
    alignas(kLineBytes) Factors factors[2][kMaxPieceSteps];
    Ahead ahead[2];
};

// make(chunk, where its lines go) for each chunk of a run, where chunks are filled up with zeros to whole steps.
template <class Make>
inline void make_padded(const Steps& steps, const Run& run, uint8_t* out, Make&& make) {
    const int64_t num_steps = steps.first_step(run.end_chunk) - steps.first_step(run.first_chunk);
    std::memset(out, 0, static_cast<size_t>(num_steps * kStepBytes));
    for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk, out += steps.per_chunk * kStepBytes) {
        make(chunk, out);
    }
}

// The lines of a piece's panel as unsigned bytes, as they lie or made in `out`; factors: of its chunks.
inline const uint8_t* make_bytes(const Matrix& w, const Steps& steps, const Run& run, uint8_t* out, Factors* factors) {
    const auto widen = kernels_of(w.format).widen;
    if (!steps.is_padded) return widen(run, {out, factors});
    Run one = run;
    make_padded(steps, run, out, [&](int64_t chunk, uint8_t* to) {
        one.first_chunk = chunk;
        one.end_chunk = chunk + 1;
        const int64_t inputs = one.inputs(chunk);
        const uint8_t* bytes = widen(one, {to, factors++});
        if (bytes != to) std::memcpy(to, bytes, static_cast<size_t>(inputs * kPanelRows));
        one.lines += inputs * w.bytes_per_input;
    });
    return out;
}

// The same as lines of a bf16 panel. Of the factors only scales, where there are groups.
inline const uint8_t* make_pairs(const Matrix& w, const Steps& steps, const Run& run, uint8_t* out, Factors* factors) {
    const bool is_bf16 = w.format == kFormat<Bf16>;
    if (run.scale != nullptr && w.num_groups > 1) {
        for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk, ++factors) {
            store_floats((*factors)[0], load_scale(run, chunk / run.chunks_per_group));
        }
    }
    const auto make = [&](int64_t first_chunk, int64_t end_chunk, uint8_t* to) {
        const int64_t first = steps.first_input(first_chunk), end = steps.first_input(end_chunk);
        if (is_bf16) {
            std::memcpy(to, w.panel(run.panel) + first * Bf16::kBytesPerInput,
                        static_cast<size_t>((end - first) * Bf16::kBytesPerInput));
        } else {
            kernels_of(w.format).expand_pairs(w, run.panel, first, end, to);
        }
    };
    if (!steps.is_padded) {
        if (is_bf16) return run.lines;
        make(run.first_chunk, run.end_chunk, out);
        return out;
    }
    make_padded(steps, run, out, [&](int64_t chunk, uint8_t* to) { make(chunk, chunk + 1, to); });
    return out;
}

// Rows [row, row + rows) of each panel's totals += added(panel, 0 …).
template <int kPanels, class Added>
inline void add_to_rows(Sums* totals, int64_t row, int64_t rows, Added&& added) {
    for (int64_t m = 0; m < rows; ++m) {
        Floats total[kPanels];
        for (int p = 0; p < kPanels; ++p) total[p] = add(load_floats(totals[p].row[row + m]), added(p, m));
        for (int p = 0; p < kPanels; ++p) store_floats(totals[p].row[row + m], total[p]);
    }
}

// Sums of a chunk, up to two tiles of rows, that are to join their totals.
struct Waiting {
    alignas(kLineBytes) UnitSums sums[2][2];  // tile, panel
    alignas(kLineBytes) Factors factors[2];   // of the chunk in each panel; those of its piece may be gone
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

// A tile of rows joins its totals, as int8_tile does it.
template <int kPanels>
inline void join_integers(const Waiting& waiting, const Run (&run)[2], const UnitRows& x, int64_t rows, Sums* totals) {
    const UnitSums* sums = waiting.sums[waiting.tile];
    const int64_t row = waiting.row, of_rows = x.factors.at(waiting.chunk, row);
    const int64_t group = waiting.chunk / run[0].chunks_per_group;
    const float* row_scale = x.factors.scale.data() + of_rows;
    const int32_t* first = x.factors.first.data() + of_rows;
    Floats scale[kPanels], offset[kPanels];
    for (int p = 0; p < kPanels; ++p) {
        scale[p] = load_floats(waiting.factors[p][0]);
        offset[p] = load_floats(waiting.factors[p][1]);
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
inline void join_floats(const Waiting& waiting, int64_t rows, Sums* totals) {
    const UnitSums* sums = waiting.sums[waiting.tile];
    Floats scale[kPanels];
    for (int p = 0; p < kPanels; ++p) scale[p] = load_floats(waiting.factors[p][0]);
    add_to_rows<kPanels>(totals, waiting.row, rows, [&](int p, int64_t m) {
        return mul(load_floats(reinterpret_cast<const float*>(sums[p][m])), scale[p]);
    });
}

// The next tile, if there is one.
template <Operand kOperand, int kPanels>
inline void join_next(Waiting& waiting, const Piece& piece, const UnitRows& x, Sums* totals) {
    if (waiting.tile == waiting.num_tiles) return;
    const int64_t rows = std::min(x.height, x.rows - waiting.row);
    if constexpr (kOperand == Operand::kInt8) {
        join_integers<kPanels>(waiting, piece.run, x, rows, totals);
    } else {
        join_floats<kPanels>(waiting, rows, totals);
    }
    waiting.row += x.height;
    ++waiting.tile;
}

// totals[..].row[first_row..] += kTiles tiles of rows, from first_row on, times a piece of kPanels panels; or, with
// joins_chunks, what waits joins, and the last chunk's sums wait.
template <class Unit, Operand kOperand, int kTiles, int kPanels>
void multiply_tiles(const Steps& steps, const UnitRows& x, int64_t first_row, Piece& piece, bool joins_chunks,
                    Waiting& waiting, Sums* totals) {
    const uint8_t* a[2] = {x.values + first_row * x.stride + steps.first_step(piece.first) * kLineBytes};
    a[1] = a[0] + x.height * x.stride;
    const uint8_t* b[2] = {piece.lines[0], piece.lines[1]};
    const auto step = [&] {
        multiply_step<Unit, kOperand, kTiles, kPanels>(a, x.stride, b, kLineBytes);
        for (int i = 0; i < kPanels; ++i) piece.ahead[i].at_step();
        for (const uint8_t*& tile : a) tile += kLineBytes;
        for (const uint8_t*& tile : b) tile += kStepBytes;
    };
    if (!joins_chunks) {
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
            join_next<kOperand, kPanels>(waiting, piece, x, totals);
        }
        join_next<kOperand, kPanels>(waiting, piece, x, totals);  // chunks of a single step leave one of two tiles
        each_sum<kTiles, kPanels>(
            [&](auto sum, int tile, int panel) { Unit::template store<sum()>(waiting.sums[tile][panel], kLineBytes); });
        waiting.begin(piece, kPanels, chunk, first_row, kTiles);
    }
}

// Pairs of a whole number of steps, each lane times its scale.
inline void scale_pairs(const float* scale, int64_t num_steps, uint8_t* lines) {
    for (const uint8_t* end = lines + num_steps * kStepBytes; lines < end; lines += kLineBytes) {
        uint32_t line[kPanelRows];
        std::memcpy(line, lines, sizeof line);
        for (int lane = 0; lane < kPanelRows; ++lane) {
            const float first = as_float(line[lane] << 16), second = as_float(line[lane] & 0xffff0000);
            line[lane] = bfloat16_bits(first * scale[lane]) | uint32_t{bfloat16_bits(second * scale[lane])} << 16;
        }
        std::memcpy(lines, line, sizeof line);
    }
}

// totals[i].row[r] = row r · panel + i, for kPanels panels.
template <class Unit, Operand kOperand, int kPanels>
void multiply_panels(const Matrix& w, const Steps& steps, const UnitRows& x, int64_t panel, Sums* totals) {
    alignas(kLineBytes) uint8_t made[2][kMaxPieceSteps * kStepBytes];
    Piece piece{};
    Waiting waiting;
    for (int i = 0; i < kPanels; ++i) {
        piece.run[i] = whole_panel(w, kernels_of(w.format), kOperand, panel + i);
        std::memset(totals[i].row, 0, sizeof totals[i].row[0] * static_cast<size_t>(x.num_tiles * x.height));
    }
    const bool has_scale = piece.run[0].scale != nullptr;
    const bool has_groups = has_scale && w.num_groups > 1;
    const bool scales_lines = kOperand == Operand::kBfloat16 && has_groups && unit_choices.scales_weights;
    const bool joins_chunks = kOperand == Operand::kInt8 || (has_groups && !scales_lines);
    const int64_t num_pairs = (x.num_tiles + 1) / 2;
    // With few rows pieces are short, so that expanding and prefetching alternate.
    const int64_t most_steps = x.num_tiles == 1 ? steps.per_chunk : kMaxPieceSteps;
    const int64_t chunks = std::max<int64_t>(1, most_steps / steps.per_chunk);
    constexpr auto kMake = kOperand == Operand::kInt8 ? make_bytes : make_pairs;
    const auto offset = [&](int64_t chunk) { return steps.first_input(chunk) * w.bytes_per_input; };
    for (piece.first = 0; piece.first < steps.num_chunks; piece.first = piece.end) {
        piece.end = std::min(piece.first + chunks, steps.num_chunks);
        for (int i = 0; i < kPanels; ++i) {
            Run& run = piece.run[i];
            run.lines = w.panel(panel + i) + offset(piece.first);
            run.first_chunk = piece.first;
            run.end_chunk = piece.end;
            piece.lines[i] = kMake(w, steps, run, made[i], piece.factors[i]);
            if (!scales_lines) continue;
            for (int64_t chunk = piece.first; chunk < piece.end; ++chunk) {
                const int64_t at = chunk - piece.first;
                scale_pairs(piece.factors[i][at][0], steps.first_step(chunk + 1) - steps.first_step(chunk),
                            made[i] + at * steps.per_chunk * kStepBytes);
            }
        }
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
            for (int i = 0; i < kPanels; ++i) {
                piece.ahead[i] = ahead_of(w, panel + i, offset(piece.first), offset(piece.end), x.num_tiles, pair);
            }
            const auto multiply = 2 * pair + 1 < x.num_tiles ? multiply_tiles<Unit, kOperand, 2, kPanels>
                                                             : multiply_tiles<Unit, kOperand, 1, kPanels>;
            multiply(steps, x, 2 * pair * x.height, piece, joins_chunks, waiting, totals);
        }
    }
    while (waiting.tile < waiting.num_tiles) join_next<kOperand, kPanels>(waiting, piece, x, totals);
    if (has_scale && !has_groups && !joins_chunks) {
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
    // totals[i].row[r] = row r · panel + i, for `count` panels, but for what the format leaves to add_rest.
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

template <class Unit, Operand kOperand>
void add_products() {
    add_product<Unit, kOperand, 0, 4, 6>();
    add_product<Unit, kOperand, 1, 4, 7>();
    add_product<Unit, kOperand, 2, 5, 6>();
    add_product<Unit, kOperand, 3, 5, 7>();
}

template <class Unit>
void run_unit_rounds(Operand operand, int64_t rounds) {
    Unit::configure(kUnitRows);
    for (int64_t i = 0; i < rounds; ++i) {
        if (operand == Operand::kInt8) {
            add_products<Unit, Operand::kInt8>();
        } else {
            add_products<Unit, Operand::kBfloat16>();
        }
    }
    Unit::release();
}

inline int64_t operations_per_round(Operand operand) {
    return int64_t{4} * kUnitRows * kPanelRows * 2 * kLineBytes / operand_bytes(operand);
}

template <class Unit>
struct UnitKernelsOf {
    static constexpr UnitKernels kKernels{&unit_choices.int8_rows, &unit_choices.scales_weights, run_unit_rounds<Unit>,
                                          operations_per_round};
};

// Null where there is no unit.
template <class Unit>
constexpr const UnitKernels* unit_kernels() {
    if constexpr (Unit::kExists) {
        return &UnitKernelsOf<Unit>::kKernels;
    } else {
        return nullptr;
    }
}

}  // namespace
}  // namespace amalgam
