// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) as the Llama family computes it.
//
// Written in lanes that the compiler maps to whatever registers its translation unit may use. With contraction to
// fused multiply-adds off, every instruction set gives the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace amalgam {
// Internal linkage on purpose: each translation unit needs its own code, compiled for its own instruction set. With
// external linkage the linker would keep one copy for all, and AVX-512 code could run on a machine without it.
namespace {

constexpr int kLanes = 16;

struct Bfloat16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(Bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void narrow(float value, float* out) { *out = value; }

// To nearest, ties to even; a NaN stays a quiet NaN.
inline void narrow(float value, Bfloat16* out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded);
}

// The value as X holds it; exact, and so without work, where X is at least as wide as T.
template <class X, class T>
inline float round_to(T value) {
    if constexpr (sizeof(X) < sizeof(T)) {
        X narrowed;
        narrow(value, &narrowed);
        return widen(narrowed);
    } else {
        return widen(value);
    }
}

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
void rms_norm_rows(const RmsNormArgs& args) {
    const X* x = static_cast<const X*>(args.x);
    const W* weight = static_cast<const W*>(args.weight);
    X* out = static_cast<X*>(args.out);
    for (int64_t row = 0; row < args.rows; ++row, x += args.hidden, out += args.hidden) {
        const float mean = sum_of_squares(x, args.hidden) / static_cast<float>(args.hidden);
        const float scale = 1.0f / std::sqrt(mean + args.eps);
        for (int64_t i = 0; i < args.hidden; ++i) {
            narrow(round_to<X>(widen(x[i]) * scale) * round_to<X>(weight[i]), &out[i]);
        }
    }
}

template <class X>
void rms_norm_rows(const RmsNormArgs& args) {
    if (args.weight_dtype == DType::kFloat32) {
        rms_norm_rows<X, float>(args);
    } else {
        rms_norm_rows<X, Bfloat16>(args);
    }
}

void rms_norm(const RmsNormArgs& args) {
    if (args.x_dtype == DType::kFloat32) {
        rms_norm_rows<float>(args);
    } else {
        rms_norm_rows<Bfloat16>(args);
    }
}

}  // namespace
}  // namespace amalgam
