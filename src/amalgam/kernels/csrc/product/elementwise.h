// Work on activations one element at a time: SwiGLU, GELU, sums, rotary embedding, the weighted sum over experts, the
// softmax of sampling.
#pragma once

#include <algorithm>

#include "isa/float_types.h"
#include "product/exponential.h"
#include "product/kernels.h"

namespace amalgam {
namespace {

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline float gelu(float x) {
    // (1 + tanh(a)) / 2 = sigmoid(2 a)
    return x / (1.0f + exponential(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
}

// Comparisons are written so that a NaN stays.
template <bool kIsGelu>
float join(const Gating& gating, float gate, float up) {
    gate = gate > gating.gate_limit ? gating.gate_limit : gate;
    up = up > gating.limit ? gating.limit : up;
    up = up < -gating.limit ? -gating.limit : up;
    float factor = kIsGelu ? gelu(gate) : gate / (1.0f + exponential(-gating.alpha * gate));
    factor = factor > gating.factor_limit ? gating.factor_limit : factor;
    return factor * (up + gating.offset);
}

template <class T, bool kIsGelu>
void join_range(const SwigluArgs& args, int64_t first, int64_t end) {
    const T* gate = static_cast<const T*>(args.gate);
    const T* up = static_cast<const T*>(args.up);
    T* out = static_cast<T*>(args.out);
    if (!args.gating.is_plain()) {
        for (int64_t i = first; i < end; ++i) {
            narrow(join<kIsGelu>(args.gating, widen(gate[i]), widen(up[i])), &out[i]);
        }
        return;
    }
    for (int64_t i = first; i < end; ++i) {
        const float x = widen(gate[i]);
        T rounded;
        narrow(kIsGelu ? gelu(x) : silu(x), &rounded);
        narrow(widen(rounded) * widen(up[i]), &out[i]);
    }
}

template <class T>
void swiglu_range(const SwigluArgs& args, int64_t first, int64_t end) {
    args.gating.is_gelu ? join_range<T, true>(args, first, end) : join_range<T, false>(args, first, end);
}

void swiglu(const SwigluArgs& args, int64_t first, int64_t end) {
    if (args.dtype == DType::kFloat32) {
        swiglu_range<float>(args, first, end);
    } else {
        swiglu_range<Bfloat16>(args, first, end);
    }
}

// Comparisons are written so that a NaN stays.
inline float clamp(float x, float limit) {
    x = x > limit ? limit : x;
    return x < -limit ? -limit : x;
}

template <class T>
void elementwise_range(const ElementwiseArgs& args, int64_t first, int64_t end) {
    T* x = static_cast<T*>(args.x);
    const T* y = static_cast<const T*>(args.y);
    switch (args.kind) {
        case ElementwiseKind::kAdd:
            for (int64_t i = first; i < end; ++i) narrow(widen(x[i]) + widen(y[i]), &x[i]);
            break;
        case ElementwiseKind::kClamp:
            for (int64_t i = first; i < end; ++i) narrow(clamp(widen(x[i]), args.number), &x[i]);
            break;
        case ElementwiseKind::kGelu:
            for (int64_t i = first; i < end; ++i) narrow(gelu(widen(x[i])), &x[i]);
            break;
        case ElementwiseKind::kScale:
            for (int64_t i = first; i < end; ++i) narrow(widen(x[i]) * args.number, &x[i]);
            break;
        case ElementwiseKind::kSoftcap:
            for (int64_t i = first; i < end; ++i) narrow(soft_cap(widen(x[i]), args.number), &x[i]);
            break;
    }
}

void elementwise(const ElementwiseArgs& args, int64_t first, int64_t end) {
    if (args.dtype == DType::kFloat32) {
        elementwise_range<float>(args, first, end);
    } else {
        elementwise_range<Bfloat16>(args, first, end);
    }
}

template <class T>
void scale_row_range(const ScaleRowsArgs& args, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
        T* x = static_cast<T*>(args.x) + row * args.width;
        const float factor = 1.0f / (1.0f + exponential(-args.gate[row]));
        for (int64_t i = 0; i < args.width; ++i) narrow(factor * widen(x[i]), &x[i]);
    }
}

void scale_rows(const ScaleRowsArgs& args, int64_t first_row, int64_t end_row) {
    if (args.dtype == DType::kFloat32) {
        scale_row_range<float>(args, first_row, end_row);
    } else {
        scale_row_range<Bfloat16>(args, first_row, end_row);
    }
}

template <class T>
void rotate_tokens(const RotateArgs& args, int64_t first, int64_t end) {
    const int64_t half = args.half;
    for (int64_t token = first; token < end; ++token) {
        const T* x = static_cast<const T*>(args.x) + token * args.token_stride;
        T* out = static_cast<T*>(args.out) + token * args.heads * args.head_dim;
        const float* cos = args.cos + token * half;
        const float* sin = args.sin + token * half;
        for (int64_t head = 0; head < args.heads; ++head, x += args.head_dim, out += args.head_dim) {
            for (int64_t i = 0; i < half; ++i) {
                const float a = widen(x[i]), b = widen(x[half + i]);
                narrow(a * cos[i] - b * sin[i], &out[i]);
                narrow(b * cos[i] + a * sin[i], &out[half + i]);
            }
            for (int64_t i = 2 * half; i < args.head_dim; ++i) out[i] = x[i];
        }
    }
}

void rotate(const RotateArgs& args, int64_t first_token, int64_t end_token) {
    if (args.dtype == DType::kFloat32) {
        rotate_tokens<float>(args, first_token, end_token);
    } else {
        rotate_tokens<Bfloat16>(args, first_token, end_token);
    }
}

template <class Out>
void combine_tokens(const CombineArgs& args, int64_t first, int64_t end) {
    constexpr int64_t kPart = 256;
    for (int64_t token = first; token < end; ++token) {
        const int32_t* slots = args.slots + token * args.num_active;
        const float* weights = args.gate_weights + token * args.num_active;
        Out* out = static_cast<Out*>(args.out) + token * args.hidden;
        for (int64_t start = args.first_column; start < args.end_column; start += kPart) {
            const int64_t count = args.end_column - start < kPart ? args.end_column - start : kPart;
            float total[kPart];
            bool is_empty = true;
            for (int64_t k = 0; k < args.num_active; ++k) {
                if (slots[k] < 0) continue;
                const float* part = args.parts + slots[k] * args.hidden + start;
                const float weight = weights[k];
                if (is_empty) {
                    for (int64_t i = 0; i < count; ++i) total[i] = part[i] * weight;
                    is_empty = false;
                } else {
                    for (int64_t i = 0; i < count; ++i) total[i] += part[i] * weight;
                }
            }
            if (is_empty) std::fill_n(total, count, 0.0f);
            for (int64_t i = 0; i < count; ++i) narrow(total[i], &out[start + i]);
        }
    }
}

void combine(const CombineArgs& args, int64_t first_token, int64_t end_token) {
    if (args.out_dtype == DType::kFloat32) {
        combine_tokens<float>(args, first_token, end_token);
    } else {
        combine_tokens<Bfloat16>(args, first_token, end_token);
    }
}

void boltzmann(const BoltzmannArgs& args, double* weights) {
    const double largest = static_cast<double>(args.largest), temperature = args.temperature;
    const float* logits = args.logits;
    for (int64_t i = 0; i < args.count; ++i) {
        weights[i] = exponential_below_0((static_cast<double>(logits[i]) - largest) / temperature);
    }
}

}  // namespace
}  // namespace amalgam
