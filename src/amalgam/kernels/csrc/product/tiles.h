// The vector loops that multiply a tile, and which of them a format has.
//
// Order of accumulation of every output element: within a chunk from zero, inputs in order (bfloat16 pairs in kPairSums
// accumulators, in turn); then the chunk's sum, times its scale, is added to the total, chunks in order. Sums of int8
// products are exact.
#pragma once

#include "formats/byte_lines.h"
#include "formats/table.h"
#include "product/codes_tile.h"
#include "product/format_kernels.h"
#include "product/kernels.h"
#include "product/tile.h"

namespace amalgam {
namespace {

// Software prefetch: short tiles into L1, long ones into L2. L1 has few fill buffers and stalls when all are
// taken; tiles that compute long enough for that to matter prefetch farther ahead.
template <class F, int M>
class TilePrefetch {
 public:
    explicit TilePrefetch(const Run& run)
        : distance_(run.ahead != nullptr ? 0
                    : kIsFar             ? 8192
                                         : 4096),
          next_(run.ahead),
          left_(run.ahead != nullptr ? run.ahead_lines : 0),
          lines_per_chunk_(left_ / (run.end_chunk - run.first_chunk) + 1) {}

    // At each line. Where something else is prefetched, the line is in the cache, and this costs nothing.
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
    static constexpr bool kIsFar = M >= (F::kBits > 8 ? 4 : 2);
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

// Accumulators per element, to hide the latency of a dependent addition. Integers may be added in any order.
constexpr int num_chains(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }

// y [M, 16] += int8 activations times lines of integers.
template <class F, int M>
void int8_tile(const Run& run, const TileRows& x, float* y) {
    constexpr int kInputs = F::kInputsPerLine, kChains = num_chains(M);
    constexpr int kLines = kChains > F::kDotsPerLine ? kChains / F::kDotsPerLine : 1;
    Totals<M> total(y);
    TilePrefetch<F, M> prefetcher(run);
    GroupCursor cursor(run);
    GroupFactors factors = load_factors<F>(run, cursor.group);
    const uint8_t* line = run.lines;
    int64_t at = 0;
    for (int64_t chunk = run.first_chunk, local = 0; chunk < run.end_chunk; ++chunk, ++local) {
        prefetcher.at_chunk();
        Ints sum[kChains][M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
            sum[0][m] = F::first_sum(run, cursor.group, -x.sum[m][local]);
#pragma GCC unroll 16
            for (int chain = 1; chain < kChains; ++chain) sum[chain][m] = broadcast_int(0);
        }
        const int64_t end = at + run.inputs(chunk);
        for (; at + kLines * kInputs <= end; at += kLines * kInputs, line += kLines * kLineBytes) {
#pragma GCC unroll 16
            for (int i = 0; i < kLines; ++i) {
                prefetcher.at_line(line + i * kLineBytes);
                F::template add_line<M, kChains>(line + i * kLineBytes, x, at + i * kInputs, i * F::kDotsPerLine, sum);
            }
        }
        for (; at < end; at += kInputs, line += kLineBytes) F::template add_line<M, kChains>(line, x, at, 0, sum);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
            for (int chain = 1; chain < kChains; ++chain) sum[0][m] = add(sum[0][m], sum[chain][m]);
            const Floats factor = mul(factors.scale, broadcast_float(x.scale[m] + local));
            total.row[m] = add(total.row[m], mul(to_floats(sum[0][m]), factor));
            if (run.offset != nullptr) {
                const float values = x.scale[m][local] * static_cast<float>(x.sum[m][local]);
                total.row[m] = add(total.row[m], mul(factors.offset, broadcast(values)));
            }
        }
        if (cursor.next() && chunk + 1 < run.end_chunk) factors = load_factors<F>(run, cursor.group);
    }
    total.store(y);
}

// Two pairs of inputs, from `at` on, in kPairSums accumulators for every number of rows, so that all rows are summed in
// the same order.
template <int M>
inline void add_pairs(const Pairs& first, const Pairs& second, const TileRows& x, int64_t at, Floats (*sum)[M]) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
        sum[0][m] = dot_pairs(sum[0][m], first, broadcast4(x.values[m] + 2 * at));
        sum[kPairSums - 1][m] = dot_pairs(sum[kPairSums - 1][m], second, broadcast4(x.values[m] + 2 * at + 4));
    }
}

// y [M, 16] += bfloat16 activations times lines that become bfloat16 pairs: each step of F::kLinesPerStep lines gives
// F::kPartsPerStep times two pairs.
template <class F, int M>
void bfloat16_tile(const Run& run, const TileRows& x, float* y) {
    constexpr int kParts = F::kPartsPerStep, kLines = F::kLinesPerStep;
    const typename F::Loader loader(run);
    Totals<M> total(y);
    TilePrefetch<F, M> prefetcher(run);
    GroupCursor cursor(run);
    Floats scale = run.scale != nullptr ? load_scale(run, cursor.group) : zero_floats();
    const uint8_t* line = run.lines;
    int64_t at = 0;
    for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk) {
        prefetcher.at_chunk();
        Floats sum[kPairSums][M];
#pragma GCC unroll 16
        for (int m = 0; m < kPairSums * M; ++m) sum[m / M][m % M] = zero_floats();
        for (const int64_t end = at + run.inputs(chunk); at < end; at += 4 * kParts, line += kLines * kLineBytes) {
#pragma GCC unroll 3
            for (int i = 0; i < kLines; ++i) prefetcher.at_line(line + i * kLineBytes);
#pragma GCC unroll 2
            for (int part = 0; part < kParts; ++part) {
                Pairs first, second;
                loader.load(line, part, first, second);
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
    TilePrefetch<Fp32, M> prefetcher(run);
    const uint8_t* line = run.lines;
    int64_t at = 0;
    for (int64_t chunk = run.first_chunk; chunk < run.end_chunk; ++chunk) {
        prefetcher.at_chunk();
        Floats sum[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sum[m] = zero_floats();
        for (const int64_t end = at + run.inputs(chunk); at < end; ++at, line += kLineBytes) {
            prefetcher.at_line(line);
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

// The tile function for M rows and lines of format F.
template <class F, int M>
constexpr TileFunction tile_function() {
    if constexpr (kOwnTile<F, M> != nullptr) {
        return kOwnTile<F, M>;
    } else if constexpr (F::kIsCodes && M > F::kChainRows) {
        return codes_tile<F, M, TilePrefetch<F, M>>;
    } else if constexpr (F::kOperand == Operand::kInt8) {
        return int8_tile<F, M>;
    } else if constexpr (F::kOperand == Operand::kBfloat16) {
        return bfloat16_tile<F, M>;
    } else {
        return float32_tile<M>;
    }
}

template <class F, int M>
constexpr void add_tiles(FormatKernels& kernels) {
    if constexpr (M > 0) {
        kernels.tiles[M - 1] = tile_function<F, M>();
        add_tiles<F, M - 1>(kernels);
    }
}

template <class F>
constexpr FormatKernels format_kernels() {
    constexpr int kRows = kOwnTileRows<F> > 0 ? kOwnTileRows<F> : kTileRows;
    static_assert(kRows <= kMaxTileRows);
    FormatKernels kernels{F::kOperand, F::kBytesPerInput, F::kScaleFactor, F::kDirectRows, kRows, F::expand_floats,
                          nullptr,     nullptr,           nullptr,         kByteZero<F>,   {}};
    if constexpr (F::kBits < 16) kernels.expand_pairs = F::expand_pairs;
    if constexpr (F::kHasExceptions) kernels.add_exceptions = F::add_exceptions;
    if constexpr (kHasByteLines<F>) kernels.expand_bytes = expand_bytes<F>;
    if constexpr (F::kDirectRows > 0) add_tiles<F, kRows>(kernels);
    return kernels;
}

}  // namespace
}  // namespace amalgam
