// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) as the Llama family computes it.
//
// Written in lanes that the compiler maps to whatever registers its translation unit may use. With contraction to
// fused multiply-adds off, every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "float_types.h"
#include "kernels.h"

namespace amalgam {
namespace {

constexpr int kLanes = 16;

template <class X>
float sum_of_squares(const X* x, int64_t size) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const float value = widen(x[i + lane]);
            lanes[lane] += value * value;
        }
    }
    for (int lane = 0; i + lane < size; ++lane) {
        const float value = widen(x[i + lane]);
        lanes[lane] += value * value;
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

template <class X, class W>
void rms_norm_rows(const RmsNormArgs& args, int64_t first, int64_t end) {
    const W* weight = static_cast<const W*>(args.weight);
    for (int64_t row = first; row < end; ++row) {
        const X* x = static_cast<const X*>(args.x) + row * args.hidden;
        X* out = static_cast<X*>(args.out) + row * args.hidden;
        if (args.delta != nullptr) {
            const X* delta = static_cast<const X*>(args.delta) + row * args.hidden;
            X* sum = static_cast<X*>(args.sum) + row * args.hidden;
            // x and sum may be the same row: no element depends on another.
#pragma GCC ivdep
            for (int64_t i = 0; i < args.hidden; ++i) narrow(widen(x[i]) + widen(delta[i]), &sum[i]);
            x = sum;
        }
        const float mean = sum_of_squares(x, args.hidden) / static_cast<float>(args.hidden);
        const float scale = 1.0f / std::sqrt(mean + args.eps);
        for (int64_t i = 0; i < args.hidden; ++i) {
            narrow(round_to<X>(widen(x[i]) * scale) * round_to<X>(weight[i]), &out[i]);
        }
    }
}

template <class X>
void rms_norm_rows(const RmsNormArgs& args, int64_t first, int64_t end) {
    if (args.weight_dtype == DType::kFloat32) {
        rms_norm_rows<X, float>(args, first, end);
    } else {
        rms_norm_rows<X, Bfloat16>(args, first, end);
    }
}

void rms_norm(const RmsNormArgs& args, int64_t first, int64_t end) {
    if (args.x_dtype == DType::kFloat32) {
        rms_norm_rows<float>(args, first, end);
    } else {
        rms_norm_rows<Bfloat16>(args, first, end);
    }
}

}  // namespace
}  // namespace amalgam
