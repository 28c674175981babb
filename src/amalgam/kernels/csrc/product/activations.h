// Activations in the form that a product reads: gathered, padded, and for integer weights quantized.
//
// Quantization is symmetric, per row and chunk: scale = largest magnitude / 127, values rounded half to even. It
// depends on nothing but the row, so that a token's result does not depend on its batch.
#pragma once

#include <algorithm>

#include "isa/float_types.h"
#include "product/kernels.h"

namespace amalgam {
namespace {

// Inputs [first, first + count) of one row in packed order as floats.
template <class X>
inline void gather(const X* x, const int32_t* order, int64_t first, int64_t count, float* out) {
    if (order != nullptr) {
        for (int64_t i = 0; i < count; ++i) out[i] = widen(x[order[first + i]]);
    } else {
        for (int64_t i = 0; i < count; ++i) out[i] = widen(x[first + i]);
    }
}

inline void quantize_chunk(const float* x, int64_t count, int8_t* values, float* scale, int32_t* sum) {
    // As integers, magnitudes compare like floats, with NaN above all: it reaches the scale and thereby the result.
    int32_t largest_bits = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t magnitude = static_cast<int32_t>(as_bits(x[i]) & 0x7fffffff);
        largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    const float largest = as_float(static_cast<uint32_t>(largest_bits));
    const bool is_zero = largest < 1e-30f;  // its inverse would overflow
    const float inverse = is_zero ? 0.0f : 127.0f / largest;
    *scale = is_zero ? 0.0f : largest / 127.0f;
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int8_t value = static_cast<int8_t>(as_bits(x[i] * inverse + kRounder) - as_bits(kRounder));
        values[i] = value;
        total += value;
    }
    *sum = total;
}

inline void sum_parts(const int8_t* values, int64_t count, int64_t part, int16_t* sums) {
    for (int64_t first = 0; first < count; first += part, ++sums) {
        int32_t sum = 0;
        for (int64_t i = 0; i < part; ++i) sum += values[first + i];
        *sums = static_cast<int16_t>(sum);
    }
}

template <class X>
void convert_row(const ConvertArgs& args, const X* x, int64_t row) {
    const int64_t num_chunks = (args.padded_columns + args.chunk - 1) / args.chunk;
    alignas(64) float wide[kChunk];
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const int64_t first = chunk * args.chunk;
        const int64_t padded = std::min(args.chunk, args.padded_columns - first);
        const int64_t count = std::clamp<int64_t>(args.columns - first, 0, padded);
        gather(x, args.order, first, count, wide);
        for (int64_t i = count; i < padded; ++i) wide[i] = 0.0f;
        const int64_t at = row * args.stride + first;
        switch (args.kind) {
            case Operand::kInt8:
                quantize_chunk(wide, padded, static_cast<int8_t*>(args.values) + at,
                               args.scale + row * num_chunks + chunk, args.sum + row * num_chunks + chunk);
                if (args.part > 0) {
                    sum_parts(static_cast<const int8_t*>(args.values) + at, padded, args.part,
                              args.part_sums + (row * args.padded_columns + first) / args.part);
                }
                break;
            case Operand::kBfloat16:
                for (int64_t i = 0; i < padded; ++i) {
                    static_cast<uint16_t*>(args.values)[at + i] = bfloat16_bits(wide[i]);
                }
                break;
            case Operand::kFloat32:
                std::memcpy(static_cast<float*>(args.values) + at, wide, sizeof(float) * static_cast<size_t>(padded));
                break;
        }
    }
}

void convert(const ConvertArgs& args, int64_t first_row, int64_t end_row) {
    for (int64_t row = first_row; row < end_row; ++row) {
        const int64_t source = args.index != nullptr ? args.index[row] : row;
        const void* x = advance(args.x, args.x_dtype, source * args.x_stride);
        if (args.x_dtype == DType::kFloat32) {
            convert_row(args, static_cast<const float*>(x), row);
        } else {
            convert_row(args, static_cast<const Bfloat16*>(x), row);
        }
    }
}

}  // namespace
}  // namespace amalgam
