// What attention computes with: operands of 32 bits, powers of two, the microkernel of both products.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention/attention.h"
#include "isa/isa.h"
#include "product/tile.h"
#include "runtime/prefetcher.h"

// For functions whose arrays must end up in registers.
#if defined(__GNUC__)
#define AMALGAM_INLINE inline __attribute__((always_inline))
#define AMALGAM_INLINE_LAMBDA __attribute__((always_inline))
#else
#define AMALGAM_INLINE inline
#define AMALGAM_INLINE_LAMBDA
#endif

namespace amalgam {
namespace {

constexpr int kTileBlocks = static_cast<int>(kTileKeys) / kLanes;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// What one 32-bit lane holds. kUsesUnit: all products run on the matrix unit, however few the rows are. Its sums differ
// from those of `multiply_add` in the last bits, and a row's bits must not depend on its neighbours.
struct PairArithmetic {
    using Element = Bfloat16;
    using Line = Pairs;
    using Word = Operand4;
    static constexpr int kElements = 2;
    static constexpr bool kUsesUnit = MatrixUnit<>::kExists;
    static Line load(const float* p) { return load_pairs(reinterpret_cast<const uint8_t*>(p)); }
    static Word word(const float* p) { return broadcast4(p); }
    static Floats multiply_add(Floats sum, const Line& line, const Word& word) { return dot_pairs(sum, line, word); }
};

struct FloatArithmetic {
    using Element = float;
    using Line = Floats;
    using Word = Floats;
    static constexpr int kElements = 1;
    static constexpr bool kUsesUnit = false;
    static Line load(const float* p) { return load_floats(p); }
    static Word word(const float* p) { return broadcast_float(p); }
    static Floats multiply_add(Floats sum, const Line& line, const Word& word) { return fused(line, word, sum); }
};

// 2^x for x <= 0 to about 1 unit in the last place, 0 below 2^-126; NaN stays; 2^0 is 1. Coefficients: Cephes exp2f.
inline Floats exp2_lanes(Floats x) {
    const Floats rounder = broadcast(kRounder);
    const Floats shifted = add(x, rounder);
    const Floats fraction = subtract(x, subtract(shifted, rounder));
    Floats result = broadcast(1.535336188319500e-4f);
    for (const float coefficient : {1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                                    2.402264791363012e-1f, 6.931472028550421e-1f, 1.0f}) {
        result = fused(result, fraction, broadcast(coefficient));
    }
    return zero_below(scale_exponent(result, shifted), x, -126.0f);
}

inline float exp2_scalar(float x) {
    alignas(64) float lanes[kLanes];
    store_floats(lanes, exp2_lanes(broadcast(x)));
    return lanes[0];
}

inline float sum_lanes(const float* lanes) {
    float sum[kLanes];
    std::memcpy(sum, lanes, sizeof sum);
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) sum[lane] += sum[lane + width];
    }
    return sum[0];
}

// Rows of floats, or of words of 32 bits, so many floats apart.
template <class T>
struct Rows {
    T* data;
    int64_t stride;
};

// results = words [rows, steps] × lines [steps, columns], added to results * factors [rows] where there are factors.
struct RowProduct {
    Rows<const float> words, lines;
    Rows<float> results;
    int64_t steps;
    const float* factors = nullptr;
};

// M rows, N blocks of 16 columns from this one on.
template <class A, int M, int N>
inline void multiply(const RowProduct& x, int64_t block) {
    const float *words = x.words.data, *lines = x.lines.data + block * kLanes, *factors = x.factors;
    float* results = x.results.data + block * kLanes;
    const int64_t word_stride = x.words.stride, line_stride = x.lines.stride, stride = x.results.stride;
    const int64_t steps = x.steps;
    Floats sum[M][N];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            sum[m][n] = factors == nullptr
                            ? zero_floats()
                            : mul(load_floats(results + m * stride + n * kLanes), broadcast_float(factors + m));
        }
    }
    for (int64_t step = 0; step < steps; ++step, lines += line_stride) {
        typename A::Line line[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) line[n] = A::load(lines + n * kLanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const typename A::Word word = A::word(words + m * word_stride + step);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) sum[m][n] = A::multiply_add(sum[m][n], line[n], word);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) store_floats(results + m * stride + n * kLanes, sum[m][n]);
    }
}

// The same over any number of blocks. Few rows take more blocks at a time, to have enough sums in flight.
template <class A, int M>
inline void multiply_blocks(const RowProduct& x, int64_t blocks, Prefetcher& prefetcher) {
    constexpr int kBlocks = std::max(1, std::min(4, kAccumulators / M));
    int64_t block = 0;
    for (; block + kBlocks <= blocks; block += kBlocks) {
        multiply<A, M, kBlocks>(x, block);
        prefetcher.advance();
    }
    for (; block < blocks; ++block) multiply<A, M, 1>(x, block);
}

}  // namespace
}  // namespace amalgam
