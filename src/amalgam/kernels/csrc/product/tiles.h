// The inner loops: a tile of up to kTileRows rows of activations times a run of chunks of one panel.
//
// For every output element: within a chunk the products are summed from zero, inputs in order (bfloat16 pairs are dealt
// out to kPairSums sums); the chunk's sum, times its scale, joins the total, chunks in order. Sums of int8 products are
// exact integers.
#pragma once

#include "formats/bf16_coded.h"
#include "isa/isa.h"
#include "product/kernels.h"

namespace amalgam {
namespace {

// Chunks [first_chunk, end_chunk) of a panel.
struct Run {
    const uint8_t* lines;  // at the first chunk
    int64_t first_chunk;
    int64_t end_chunk;
    int64_t chunk;             // inputs
    int64_t chunks_per_group;  // at least all of them: one group
    int64_t padded_columns;
    const void* scale;  // at the panel's first group, or null
    DType scale_dtype;
    int scale_lanes;
    const uint8_t* zero;   // at the panel's first group, or null
    const uint8_t* ahead;  // what to ask for while these lines are computed; null: the lines themselves
    int64_t ahead_lines;   // how much of it
    uint8_t window;        // of a coded panel
    float factor;          // multiplies every scale; a power of two

    int64_t inputs(int64_t index) const {
        const int64_t left = padded_columns - index * chunk;
        return left < chunk ? left : chunk;
    }
};

// Rows of activations, each at the first input of the run; chunk scales and sums at the first chunk.
struct TileRows {
    const uint8_t* values[kTileRows];
    const float* scale[kTileRows];
    const int32_t* sum[kTileRows];
};

inline Floats load_scale(const Run& run, int64_t group) {
    alignas(64) float wide[kPanelRows];
    if (run.scale_lanes == 1) {
        float value;
        widen_all(advance(run.scale, run.scale_dtype, group), run.scale_dtype, 1, &value);
        value *= run.factor;
        return broadcast_float(&value);
    }
    widen_all(advance(run.scale, run.scale_dtype, group * kPanelRows), run.scale_dtype, kPanelRows, wide);
    for (float& lane : wide) lane *= run.factor;
    return load_floats(wide);
}

// Follows the group that a chunk is in, without a division per chunk.
struct GroupCursor {
    int64_t group, left, chunks_per_group;

    explicit GroupCursor(const Run& run)
        : group(run.first_chunk / run.chunks_per_group),
          left(run.chunks_per_group - run.first_chunk % run.chunks_per_group),
          chunks_per_group(run.chunks_per_group) {}

    // To the next chunk; whether it is in another group.
    bool next() {
        if (--left > 0) return false;
        left = chunks_per_group;
        ++group;
        return true;
    }
};

// Asks for what comes next. Where there is little to compute, into the first-level cache. It keeps track of a few dozen
// lines under way and waits when there are more: tiles that compute long enough for that to matter ask farther ahead,
// for lines in the second-level cache, and compute meanwhile.
template <bool kIsWide, int M>
class Ahead {
 public:
    explicit Ahead(const Run& run)
        : distance_(run.ahead != nullptr ? 0
                    : kIsFar             ? 8192
                                         : 4096),
          next_(run.ahead),
          left_(run.ahead != nullptr ? run.ahead_lines : 0),
          lines_per_chunk_(left_ / (run.end_chunk - run.first_chunk) + 1) {}

    // At each line. Where something else is asked for, the line is here, and asking costs nothing.
    void at_line(const uint8_t* line) const {
        if constexpr (kIsFar) {
            prefetch_far(line + distance_);
        } else {
            prefetch(line + distance_);
        }
    }

    // At each chunk, a handful of lines.
    void at_chunk() {
        const int64_t count = left_ < lines_per_chunk_ ? left_ : lines_per_chunk_;
        for (int64_t i = 0; i < count; ++i, next_ += kLineBytes) prefetch_far(next_);
        left_ -= count;
    }

 private:
    static constexpr bool kIsFar = M >= (kIsWide ? 4 : 2);
    int64_t distance_;
    const uint8_t* next_;
    int64_t left_, lines_per_chunk_;
};

template <int M>
struct Totals {
    Floats row[M];

    explicit Totals(const float* y) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) row[m] = load_floats(y + m * kPanelRows);
    }
    void store(float* y) const {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) store_floats(y + m * kPanelRows, row[m]);
    }
};

// How many sums of each element run side by side: a single one would have to wait for itself. Integers may be added in
// any order.
constexpr int num_chains(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// One line of int4 or int8 weights, added to the sums from `chain` on.
template <Format F, int M>
inline void add_line(const uint8_t* line, const TileRows& x, int64_t at, int chain, Ints (*sum)[M]) {
    constexpr int kChains = num_chains(M);
    if constexpr (F == Format::kInt4) {
        Bytes low, high;
        load_nibbles(line, low, high);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            Ints& first = sum[chain % kChains][m];
            first = dot_nibbles(first, low, broadcast4(x.values[m] + at));
            Ints& second = sum[(chain + 1) % kChains][m];
            second = dot_nibbles(second, high, broadcast4(x.values[m] + at + 4));
        }
    } else {
        const Bytes w = load_int8(line);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            Ints& only = sum[chain % kChains][m];
            only = dot_int8(only, w, broadcast4(x.values[m] + at));
        }
    }
}

// y [M, 16] += int8 activations times int4 or int8 weights.
template <Format F, int M>
void int8_tile(const Run& run, const TileRows& x, float* y) {
    static_assert(F == Format::kInt4 || F == Format::kInt8);
    constexpr int kInputs = Matrix::inputs_per_line(F), kSumsPerLine = F == Format::kInt4 ? 2 : 1;
    constexpr int kChains = num_chains(M), kLines = kChains > kSumsPerLine ? kChains / kSumsPerLine : 1;
    Totals<M> total(y);
    Ahead<false, M> ahead(run);
    GroupCursor cursor(run);
    Floats scale = load_scale(run, cursor.group);
    const uint8_t* line = run.lines;
    int64_t at = 0;
    for (int64_t chunk = run.first_chunk, local = 0; chunk < run.end_chunk; ++chunk, ++local) {
        ahead.at_chunk();
        Ints sum[kChains][M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const int32_t bias = -x.sum[m][local];
            if constexpr (F == Format::kInt8) {
                sum[0][m] = broadcast_int(bias * kInt8Bias);
            } else {
                sum[0][m] = run.zero != nullptr ? zero_times(run.zero + cursor.group * kPanelRows, bias)
                                                : broadcast_int(bias * 8);
            }
#pragma GCC unroll 16
            for (int chain = 1; chain < kChains; ++chain) sum[chain][m] = broadcast_int(0);
        }
        const int64_t end = at + run.inputs(chunk);
        for (; at + kLines * kInputs <= end; at += kLines * kInputs, line += kLines * kLineBytes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLines; ++i) {
                ahead.at_line(line + i * kLineBytes);
                add_line<F, M>(line + i * kLineBytes, x, at + i * kInputs, i * kSumsPerLine, sum);
            }
        }
        for (; at < end; at += kInputs, line += kLineBytes) add_line<F, M>(line, x, at, 0, sum);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
            for (int chain = 1; chain < kChains; ++chain) sum[0][m] = add(sum[0][m], sum[chain][m]);
            const Floats factor = mul(scale, broadcast_float(x.scale[m] + local));
            total.row[m] = add(total.row[m], mul(to_floats(sum[0][m]), factor));
        }
        if (cursor.next() && chunk + 1 < run.end_chunk) scale = load_scale(run, cursor.group);
    }
    total.store(y);
}

// Two pairs of inputs, from `at` on. They go to kPairSums sums in turn, because one sum would have to wait for itself;
// for every number of rows, so that all rows are summed in the same order.
template <int M>
inline void add_pairs(const Pairs& first, const Pairs& second, const TileRows& x, int64_t at, Floats (*sum)[M]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        sum[0][m] = dot_pairs(sum[0][m], first, broadcast4(x.values[m] + 2 * at));
        sum[kPairSums - 1][m] = dot_pairs(sum[kPairSums - 1][m], second, broadcast4(x.values[m] + 2 * at + 4));
    }
}

// A step through the lines of a format: kParts times two pairs.
template <Format F>
struct PairLines;

template <>
struct PairLines<Format::kBfloat16> {
    static constexpr int kLines = 2, kParts = 1;
    explicit PairLines(const Run&) {}
    void load(const uint8_t* line, int, Pairs& first, Pairs& second) const {
        first = load_pairs(line);
        second = load_pairs(line + kLineBytes);
    }
};

template <>
struct PairLines<Format::kFp8> {
    static constexpr int kLines = 1, kParts = 1;
    explicit PairLines(const Run&) {}
    void load(const uint8_t* line, int, Pairs& first, Pairs& second) const { load_fp8(line, first, second); }
};

template <>
struct PairLines<Format::kCodedBfloat16> {
    static constexpr int kLines = 3, kParts = 2;
    explicit PairLines(const Run& run) : codes_(codes_of(run.window)) {}
    void load(const uint8_t* line, int part, Pairs& first, Pairs& second) const {
        load_coded(line, part, codes_, first, second);
    }

 private:
    Codes codes_;
};

// y [M, 16] += bfloat16 activations times lines that become bfloat16 pairs.
template <Format F, int M>
void bfloat16_tile(const Run& run, const TileRows& x, float* y) {
    constexpr bool kIsWide = F != Format::kFp8;
    constexpr int kParts = PairLines<F>::kParts, kLines = PairLines<F>::kLines;
    const PairLines<F> lines(run);
    Totals<M> total(y);
    Ahead<kIsWide, M> ahead(run);
    GroupCursor cursor(run);
    Floats scale = run.scale != nullptr ? load_scale(run, cursor.group) : zero_floats();
    const uint8_t* line = run.lines;
    int64_t at = 0;
    for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk) {
        ahead.at_chunk();
        Floats sum[kPairSums][M];
#pragma GCC unroll 16
        for (int m = 0; m < kPairSums * M; ++m) sum[m / M][m % M] = zero_floats();
        for (const int64_t end = at + run.inputs(chunk); at < end; at += 4 * kParts, line += kLines * kLineBytes) {
#pragma GCC unroll 3
            for (int i = 0; i < kLines; ++i) ahead.at_line(line + i * kLineBytes);
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                Pairs first, second;
                lines.load(line, part, first, second);
                add_pairs<M>(first, second, x, at + 4 * part, sum);
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            const Floats both = kPairSums == 2 ? add(sum[0][m], sum[kPairSums - 1][m]) : sum[0][m];
            total.row[m] = add(total.row[m], run.scale != nullptr ? mul(both, scale) : both);
        }
        if (run.scale != nullptr && cursor.next() && chunk + 1 < run.end_chunk) scale = load_scale(run, cursor.group);
    }
    total.store(y);
}

// y [M, 16] += float32 activations times float32 lines.
template <int M>
void float32_tile(const Run& run, const TileRows& x, float* y) {
    Totals<M> total(y);
    Ahead<true, M> ahead(run);
    const uint8_t* line = run.lines;
    int64_t at = 0;
    for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk) {
        ahead.at_chunk();
        Floats sum[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = zero_floats();
        for (const int64_t end = at + run.inputs(chunk); at < end; ++at, line += kLineBytes) {
            ahead.at_line(line);
            const Floats w = load_floats(reinterpret_cast<const float*>(line));
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
                const float* value = reinterpret_cast<const float*>(x.values[m]) + at;
                sum[m] = add(sum[m], mul(w, broadcast_float(value)));
            }
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) total.row[m] = add(total.row[m], sum[m]);
    }
    total.store(y);
}

using TileFunction = void (*)(const Run&, const TileRows&, float*);

template <int M>
TileFunction tile_of(Operand operand, Format lines) {
    switch (operand) {
        case Operand::kInt8:
            return lines == Format::kInt4 ? int8_tile<Format::kInt4, M> : int8_tile<Format::kInt8, M>;
        case Operand::kBfloat16:
            return lines == Format::kFp8             ? bfloat16_tile<Format::kFp8, M>
                   : lines == Format::kCodedBfloat16 ? bfloat16_tile<Format::kCodedBfloat16, M>
                                                     : bfloat16_tile<Format::kBfloat16, M>;
        default:
            return float32_tile<M>;
    }
}

// The loop for `rows` rows, at most kTileRows, over lines of this format (after expansion, if any).
template <int M = kTileRows>
inline TileFunction tile_function(Operand operand, Format lines, int64_t rows) {
    if constexpr (M > 1) {
        if (rows < M) return tile_function<M - 1>(operand, lines, rows);
    }
    return tile_of<M>(operand, lines);
}

}  // namespace
}  // namespace amalgam
