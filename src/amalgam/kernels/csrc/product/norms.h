// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) as the Llama family computes it, and LayerNorm (Ba et al. 2016).
//
// Written in lanes that the compiler maps to whatever registers its translation unit may use. With contraction to
// fused multiply-adds off, every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "isa/float_types.h"
#include "product/kernels.h"

namespace amalgam {
namespace {

// The sum over a row of function(value), in an order that depends on its size only.
template <class X, class Function>
float sum_over(const X* x, int64_t size, Function&& function) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += function(widen(x[i + lane]));
    }
    for (int lane = 0; i + lane < size; ++lane) lanes[lane] += function(widen(x[i + lane]));
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

// A row of x, to which a delta has been added if there is one.
template <class X, class Args>
const X* summed(const Args& args, int64_t row) {
    const X* x = static_cast<const X*>(args.x) + row * args.hidden;
    if (args.delta == nullptr) return x;
    const X* delta = static_cast<const X*>(args.delta) + row * args.hidden;
    X* sum = static_cast<X*>(args.sum) + row * args.hidden;
    // x and sum may be the same row: no element depends on another.
#pragma GCC ivdep
    for (int64_t i = 0; i < args.hidden; ++i) narrow(widen(x[i]) + widen(delta[i]), &sum[i]);
    return sum;
}

template <class X, class W>
struct RmsNormRows {
    static void run(const RmsNormArgs& args, int64_t first, int64_t end) {
        const W* weight = static_cast<const W*>(args.weight);
        for (int64_t row = first; row < end; ++row) {
            const X* x = summed<X>(args, row);
            X* out = static_cast<X*>(args.out) + row * args.hidden;
            const float squares = sum_over(x, args.hidden, [](float value) { return value * value; });
            const float scale = 1.0f / std::sqrt(squares / static_cast<float>(args.hidden) + args.eps);
            if (args.rounds_last) {
                for (int64_t i = 0; i < args.hidden; ++i) narrow(widen(x[i]) * scale * widen(weight[i]), &out[i]);
                continue;
            }
            for (int64_t i = 0; i < args.hidden; ++i) {
                narrow(round_to<X>(widen(x[i]) * scale) * round_to<X>(weight[i]), &out[i]);
            }
        }
    }
};

template <class X, class W>
struct LayerNormRows {
    static void run(const LayerNormArgs& args, int64_t first, int64_t end) {
        const W *weight = static_cast<const W*>(args.weight), *bias = static_cast<const W*>(args.bias);
        const float size = static_cast<float>(args.hidden);
        for (int64_t row = first; row < end; ++row) {
            const X* x = summed<X>(args, row);
            X* out = static_cast<X*>(args.out) + row * args.hidden;
            const float mean = sum_over(x, args.hidden, [](float value) { return value; }) / size;
            const auto square = [mean](float value) { return (value - mean) * (value - mean); };
            const float scale = 1.0f / std::sqrt(sum_over(x, args.hidden, square) / size + args.eps);
            for (int64_t i = 0; i < args.hidden; ++i) {
                narrow((widen(x[i]) - mean) * scale * widen(weight[i]) + widen(bias[i]), &out[i]);
            }
        }
    }
};

// Rows<X, W>::run for the types of x and of the weight.
template <template <class, class> class Rows, class Args>
void norm_rows(const Args& args, int64_t first, int64_t end) {
    const bool is_wide = args.weight_dtype == DType::kFloat32;
    if (args.x_dtype == DType::kFloat32) {
        is_wide ? Rows<float, float>::run(args, first, end) : Rows<float, Bfloat16>::run(args, first, end);
    } else {
        is_wide ? Rows<Bfloat16, float>::run(args, first, end) : Rows<Bfloat16, Bfloat16>::run(args, first, end);
    }
}

void rms_norm(const RmsNormArgs& args, int64_t first, int64_t end) { norm_rows<RmsNormRows>(args, first, end); }

void layer_norm(const LayerNormArgs& args, int64_t first, int64_t end) { norm_rows<LayerNormRows>(args, first, end); }

}  // namespace
}  // namespace amalgam
