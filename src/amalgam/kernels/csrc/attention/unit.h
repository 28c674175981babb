// Attention's products on a matrix unit, for pairs: up to two tiles of rows times two blocks of columns at once
// (product/unit_tiles.h).
//
// A step of the unit is 16 words of each row times 16 lines of each block, tiles as packing.h writes them. Words and
// lines that fill up the last step are zeros.
//
// Order of accumulation of every result, for any number of rows: the steps' sums one after the other, from zero or from
// what the result was. A key that a row does not see has a weight of zero, whose products with finite values change no
// sum: neither do steps that only other rows need.
#pragma once

#include <cstdint>

#include "attention/microkernel.h"
#include "product/unit_tiles.h"

namespace amalgam {
namespace {

// Sets this thread's unit up for tiles of so many rows, and releases it at the end: products set it up otherwise.
template <bool kIsUsed, class Unit = MatrixUnit<>>
class TakenUnit {
 public:
    explicit TakenUnit(int64_t) {}
};

template <class Unit>
class TakenUnit<true, Unit> {
 public:
    explicit TakenUnit(int64_t rows) { Unit::configure(static_cast<int>(rows)); }
    ~TakenUnit() { Unit::release(); }
    TakenUnit(const TakenUnit&) = delete;
    TakenUnit& operator=(const TakenUnit&) = delete;
};

inline int64_t unit_steps(int64_t words) { return (words + kLanes - 1) / kLanes; }

struct UnitProduct {
    Rows<const float> words, lines;
    Rows<float> results;
    int64_t steps;
    int64_t tile_rows;
};

// Results [kTiles tiles of rows, kBlocks blocks from this one on] = words × lines; kAdds: what they were, and that.
template <class Unit, bool kAdds, int kTiles, int kBlocks>
inline void multiply_tiles(const UnitProduct& x, int64_t block) {
    // Copies stay in registers: for the compiler, instructions that touch memory may have changed x.
    constexpr int64_t kBytes = sizeof(float);
    const int64_t word_stride = x.words.stride * kBytes, line_stride = x.lines.stride * kBytes;
    const int64_t result_stride = x.results.stride * kBytes, steps = x.steps;
    float* const results[2] = {x.results.data + block * kLanes,
                               x.results.data + x.tile_rows * x.results.stride + block * kLanes};
    const float* words[2] = {x.words.data, x.words.data + (kTiles - 1) * x.tile_rows * x.words.stride};
    const float* lines[2] = {x.lines.data + block * kLanes, x.lines.data + (block + kBlocks - 1) * kLanes};
    each_sum<kTiles, kBlocks>([&](auto sum, int tile, int column) {
        if constexpr (kAdds) {
            Unit::template load<sum()>(results[tile] + column * kLanes, result_stride);
        } else {
            Unit::template zero<sum()>();
        }
    });
    for (int64_t step = 0; step < steps; ++step) {
        multiply_step<Unit, Operand::kBfloat16, kTiles, kBlocks>(words, word_stride, lines, line_stride);
        for (const float*& tile : words) tile += kLanes;
        for (const float*& tile : lines) tile += line_stride / kBytes * kLanes;
    }
    each_sum<kTiles, kBlocks>([&](auto sum, int tile, int column) {
        Unit::template store<sum()>(results[tile] + column * kLanes, result_stride);
    });
}

template <class Unit, bool kAdds, int kTiles>
inline void multiply_columns(const UnitProduct& x, int64_t blocks, Prefetcher& prefetcher) {
    int64_t block = 0;
    for (; block + 2 <= blocks; block += 2) {
        multiply_tiles<Unit, kAdds, kTiles, 2>(x, block);
        prefetcher.advance();
    }
    if (block < blocks) multiply_tiles<Unit, kAdds, kTiles, 1>(x, block);
}

// The same of up to two tiles' rows and any number of blocks.
template <class Unit, bool kAdds>
inline void multiply_on_unit(const UnitProduct& x, int64_t num_rows, int64_t blocks, Prefetcher& prefetcher) {
    if (num_rows > x.tile_rows) {
        multiply_columns<Unit, kAdds, 2>(x, blocks, prefetcher);
    } else {
        multiply_columns<Unit, kAdds, 1>(x, blocks, prefetcher);
    }
}

// Each row times its factor, which is 1 wherever the softmax's maximum stayed.
inline void scale_rows(float* row, int64_t stride, const float* factors, int64_t num_rows) {
    for (int64_t m = 0; m < num_rows; ++m, row += stride) {
        if (factors[m] == 1.0f) continue;
        const Floats factor = broadcast_float(factors + m);
        for (int64_t i = 0; i < stride; i += kLanes) store_floats(row + i, mul(load_floats(row + i), factor));
    }
}

}  // namespace
}  // namespace amalgam
