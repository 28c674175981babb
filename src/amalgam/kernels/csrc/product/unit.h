// Products on a matrix unit: up to two tiles of rows of activations times two panels at once (unit_tiles.h).
//
// Sixteen lines of a bf16 panel are a tile as they lie, those of an int8 panel too, as unsigned bytes; other formats
// are expanded, a piece at a time for all rows.
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
    const float* scale;  // of int8 rows, as Activations has them
    const int32_t* sum;
    int64_t place[kMaxRows];  // of a row in both

    UnitRows(const Steps& steps, const Activations& x, int64_t first_row, int64_t count)
        : rows(count), num_tiles(RowTiles(count).count), height(RowTiles(count).height), scale(x.scale), sum(x.sum) {
        const int64_t bytes = operand_bytes(x.kind);
        const auto row_of = [&](int64_t m) { return x.index != nullptr ? x.index[first_row + m] : first_row + m; };
        const auto row_at = [&](int64_t m) {
            return static_cast<const uint8_t*>(x.values) + row_of(m) * x.stride * bytes;
        };
        for (int64_t m = 0; m < rows; ++m) place[m] = row_of(m) * steps.num_chunks;
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

// What the products of int8 rows with lines of format F need: the lines as bytes, the sum of a chunk.
template <class F>
struct ByteLines {
    static constexpr Operand kOperand = Operand::kInt8;

    static bool is_made(const Matrix&) { return F::kByteLines != 1; }
    static void make(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
        const uint8_t* line = w.panel(panel) + first * F::kBytesPerInput;
        for (int64_t i = first; i < end;
             i += F::kInputsPerLine, line += kLineBytes, out += F::kByteLines * kLineBytes) {
            F::expand_bytes(line, out);
        }
    }
    // y [rows, 16] += sums, as int8_tile does.
    static void join(const Run& run, const Floats& scale, int64_t chunk, const UnitRows& x, int64_t first_row,
                     int64_t rows, const int32_t (*sums)[kPanelRows], float (*y)[kPanelRows]) {
        const int64_t group = chunk / run.chunks_per_group;
        for (int64_t m = 0; m < rows; ++m) {
            const int64_t at = x.place[first_row + m] + chunk;
            const Ints sum = add(load_ints(sums[m]), F::byte_sum(run, group, -x.sum[at]));
            const Floats factor = mul(scale, broadcast_float(x.scale + at));
            store_floats(y[m], add(load_floats(y[m]), mul(to_floats(sum), factor)));
        }
        if (run.offset == nullptr) return;
        const Floats offset = load_factors<F>(run, group).offset;
        for (int64_t m = 0; m < rows; ++m) {
            const int64_t at = x.place[first_row + m] + chunk;
            const float values = x.scale[at] * static_cast<float>(x.sum[at]);
            store_floats(y[m], add(load_floats(y[m]), mul(offset, broadcast(values))));
        }
    }
};

// The same for bfloat16 rows and all formats, as lines of a bf16 panel.
struct PairLines {
    static constexpr Operand kOperand = Operand::kBfloat16;

    static bool is_made(const Matrix& w) { return w.format != kFormat<Bf16>; }
    static void make(const Matrix& w, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
        if (is_made(w)) {
            kernels_of(w.format).expand_pairs(w, panel, first, end, out);
        } else {
            std::memcpy(out, w.panel(panel) + first * Bf16::kBytesPerInput,
                        static_cast<size_t>((end - first) * Bf16::kBytesPerInput));
        }
    }
    static void join(const Run&, const Floats& scale, int64_t, const UnitRows&, int64_t, int64_t rows,
                     const int32_t (*sums)[kPanelRows], float (*y)[kPanelRows]) {
        for (int64_t m = 0; m < rows; ++m) {
            const Floats sum = load_floats(reinterpret_cast<const float*>(sums[m]));
            store_floats(y[m], add(load_floats(y[m]), mul(sum, scale)));
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

// Chunks [first, end) of one or two panels.
struct Piece {
    int64_t first, end;
    Run run[2];
    const uint8_t* lines[2];
    float scale[2][kMaxPieceSteps][kPanelRows];  // of each chunk
    Ahead ahead[2];
};

// sums[..].row[first_row..] += kTiles tiles of rows, from first_row on, times a piece of kPanels panels.
template <class Unit, class Lines, int kTiles, int kPanels>
void multiply_tiles(const Steps& steps, const UnitRows& x, int64_t first_row, Piece& piece, bool joins_chunks,
                    Sums* sums) {
    const uint8_t* a[2] = {x.values + first_row * x.stride + steps.first_step(piece.first) * kLineBytes};
    a[1] = a[0] + x.height * x.stride;
    const uint8_t* b[2] = {piece.lines[0], piece.lines[1]};
    const auto step = [&] {
        multiply_step<Unit, Lines::kOperand, kTiles, kPanels>(a, x.stride, b, kLineBytes);
        for (int i = 0; i < kPanels; ++i) piece.ahead[i].at_step();
        for (const uint8_t*& tile : a) tile += kLineBytes;
        for (const uint8_t*& tile : b) tile += kStepBytes;
    };
    if (!joins_chunks) {
        const auto rows_of = [&](int tile, int panel) { return sums[panel].row[first_row + tile * x.height]; };
        each_sum<kTiles, kPanels>(
            [&](auto sum, int tile, int panel) { Unit::template load<sum()>(rows_of(tile, panel), kLineBytes); });
        for (int64_t i = steps.first_step(piece.first); i < steps.first_step(piece.end); ++i) step();
        each_sum<kTiles, kPanels>(
            [&](auto sum, int tile, int panel) { Unit::template store<sum()>(rows_of(tile, panel), kLineBytes); });
        return;
    }
    alignas(kLineBytes) int32_t found[4][kUnitRows][kPanelRows];
    for (int64_t chunk = piece.first; chunk < piece.end; ++chunk) {
        each_sum<kTiles, kPanels>([&](auto sum, int, int) { Unit::template zero<sum()>(); });
        for (int64_t i = steps.first_step(chunk); i < steps.first_step(chunk + 1); ++i) step();
        each_sum<kTiles, kPanels>([&](auto sum, int, int) { Unit::template store<sum()>(found[sum()], kLineBytes); });
        each_sum<kTiles, kPanels>([&](auto sum, int tile, int panel) {
            const int64_t row = first_row + tile * x.height;
            Lines::join(piece.run[panel], load_floats(piece.scale[panel][chunk - piece.first]), chunk, x, row,
                        std::min(x.height, x.rows - row), found[sum()], sums[panel].row + row);
        });
    }
}

// Chunks [first, end) of a panel as the unit reads them.
template <class Lines>
void make_lines(const Matrix& w, const Steps& steps, int64_t panel, int64_t first, int64_t end, uint8_t* out) {
    if (!steps.is_padded) {
        Lines::make(w, panel, steps.first_input(first), steps.first_input(end), out);
        return;
    }
    std::memset(out, 0, static_cast<size_t>((steps.first_step(end) - steps.first_step(first)) * kStepBytes));
    for (; first < end; ++first, out += steps.per_chunk * kStepBytes) {
        Lines::make(w, panel, steps.first_input(first), steps.first_input(first + 1), out);
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

// sums[i].row[r] = row r · panel + i, for `count` panels.
template <class Unit, class Lines>
void multiply_panels(const Matrix& w, const Steps& steps, const UnitRows& x, int64_t panel, int count, Sums* sums) {
    constexpr Operand kOperand = Lines::kOperand;
    alignas(kLineBytes) uint8_t made[2][kMaxPieceSteps * kStepBytes];
    Piece piece{};
    for (int i = 0; i < count; ++i) {
        piece.run[i] = whole_panel(w, kernels_of(w.format), kOperand, panel + i);
        std::memset(sums[i].row, 0, sizeof sums[i].row[0] * static_cast<size_t>(x.num_tiles * x.height));
    }
    const bool has_scale = piece.run[0].scale != nullptr;
    const bool has_groups = has_scale && w.num_groups > 1;
    const bool scales_lines = kOperand == Operand::kBfloat16 && has_groups && unit_choices.scales_weights;
    const bool joins_chunks = kOperand == Operand::kInt8 || (has_groups && !scales_lines);
    const bool is_made = Lines::is_made(w) || steps.is_padded;
    const int64_t num_pairs = (x.num_tiles + 1) / 2;
    // With few rows pieces are short, so that expanding and prefetching alternate.
    const int64_t most_steps = x.num_tiles == 1 ? steps.per_chunk : kMaxPieceSteps;
    const int64_t chunks = std::max<int64_t>(1, most_steps / steps.per_chunk);
    const auto offset = [&](int64_t chunk) { return steps.first_input(chunk) * w.bytes_per_input; };
    for (piece.first = 0; piece.first < steps.num_chunks; piece.first = piece.end) {
        piece.end = std::min(piece.first + chunks, steps.num_chunks);
        for (int i = 0; i < count; ++i) {
            piece.lines[i] = is_made ? made[i] : w.panel(panel + i) + offset(piece.first);
            if (is_made) make_lines<Lines>(w, steps, panel + i, piece.first, piece.end, made[i]);
            if (!joins_chunks && !scales_lines) continue;
            for (int64_t chunk = piece.first; chunk < piece.end; ++chunk) {
                const int64_t at = chunk - piece.first;
                const Floats scale = load_scale(piece.run[i], chunk / piece.run[i].chunks_per_group);
                store_floats(piece.scale[i][at], scale);
                if (!scales_lines) continue;
                scale_pairs(piece.scale[i][at], steps.first_step(chunk + 1) - steps.first_step(chunk),
                            made[i] + at * steps.per_chunk * kStepBytes);
            }
        }
        for (int64_t pair = 0; pair < num_pairs; ++pair) {
            for (int i = 0; i < count; ++i) {
                piece.ahead[i] = ahead_of(w, panel + i, offset(piece.first), offset(piece.end), x.num_tiles, pair);
            }
            const int64_t first_row = 2 * pair * x.height;
            const bool is_two = 2 * pair + 1 < x.num_tiles;
            const auto multiply =
                is_two       ? count == 2 ? multiply_tiles<Unit, Lines, 2, 2> : multiply_tiles<Unit, Lines, 2, 1>
                : count == 2 ? multiply_tiles<Unit, Lines, 1, 2>
                             : multiply_tiles<Unit, Lines, 1, 1>;
            multiply(steps, x, first_row, piece, joins_chunks, sums);
        }
    }
    if (has_scale && !has_groups && !joins_chunks) {
        for (int i = 0; i < count; ++i) {
            const Floats scale = load_scale(piece.run[i], 0);
            for (int64_t m = 0; m < x.rows; ++m) {
                store_floats(sums[i].row[m], mul(load_floats(sums[i].row[m]), scale));
            }
        }
    }
}

using UnitFunction = void (*)(const Matrix&, const Steps&, const UnitRows&, int64_t panel, int count, Sums*);

template <class Unit, class List>
struct UnitTable;

// By format: the function for int8 operands, or null.
template <class Unit, class... F>
struct UnitTable<Unit, FormatList<F...>> {
    template <class G>
    static constexpr UnitFunction of() {
        if constexpr (G::kByteLines > 0) {
            return multiply_panels<Unit, ByteLines<G>>;
        } else {
            return nullptr;
        }
    }
    static constexpr UnitFunction kFunctions[] = {of<F>()...};
};

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
            function_ = multiply_panels<Unit, PairLines>;
        } else if (x.kind == Operand::kInt8 && rows >= unit_choices.int8_rows) {
            function_ = UnitTable<Unit, Formats>::kFunctions[static_cast<int>(w.format)];
        }
        if (!is_used()) return;
        rows_.emplace(steps_, x, first_row, rows);
        Unit::configure(static_cast<int>(rows_->height));
    }
    ~UnitBlock() {
        if (is_used()) Unit::release();
    }
    UnitBlock(const UnitBlock&) = delete;
    UnitBlock& operator=(const UnitBlock&) = delete;

    bool is_used() const { return function_ != nullptr; }
    // sums[i].row[r] = row r · panel + i, for `count` panels, but for what the format leaves to add_rest.
    void multiply(int64_t panel, int count, Sums* sums) const { function_(w_, steps_, *rows_, panel, count, sums); }

 private:
    const Matrix& w_;
    Steps steps_;
    UnitFunction function_ = nullptr;
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
