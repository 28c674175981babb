// Merges the partial results of an item's ranges of keys and writes its output.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention/memory.h"
#include "attention/microkernel.h"
#include "isa/float_types.h"

namespace amalgam {
namespace {

// A sink takes part in the softmax with a weight of 1 and no value.
inline void begin_merge(const ItemMemory& memory) {
    const float* sinks = memory.args.sinks;
    for (int64_t row = 0; row < memory.rows; ++row) {
        memory.merged_maximum[row] = sinks != nullptr ? sinks[memory.head_of(row)] * kLog2E : kNegativeInfinity;
        memory.merged_total[row] = sinks != nullptr ? 1.0f : 0.0f;
    }
    std::fill_n(memory.merged_output, memory.rows * memory.value_dim, 0.0f);
}

inline void merge_row(const ItemMemory& memory, int64_t row, float maximum, float total, const float* output) {
    if (maximum == kNegativeInfinity && total == 0.0f) return;  // the row sees none of these keys
    float &merged_maximum = memory.merged_maximum[row], &merged_total = memory.merged_total[row];
    const float highest = std::max(merged_maximum, maximum);
    const float factor = exp2_scalar(merged_maximum - highest), joining = exp2_scalar(maximum - highest);
    merged_maximum = highest;
    merged_total = merged_total * factor + total * joining;
    float* merged = memory.merged_output + row * memory.value_dim;
    for (int64_t i = 0; i < memory.value_dim; ++i) merged[i] = merged[i] * factor + output[i] * joining;
}

// The range under way joins the others.
inline void merge_range(const ItemMemory& memory) {
    for (int64_t row = 0; row < memory.rows; ++row) {
        merge_row(memory, row, memory.range_maximum[row], sum_lanes(memory.range_total + row * kLanes),
                  memory.output_of(row));
    }
}

// The range under way is the item's partial result.
inline void store_partial(const ItemMemory& memory) {
    float* partial = memory.item.partial;
    const int64_t rows = memory.rows;
    std::copy_n(memory.range_maximum, rows, partial);
    for (int64_t row = 0; row < rows; ++row) {
        partial[rows + row] = sum_lanes(memory.range_total + row * kLanes);
        std::copy_n(memory.output_of(row), memory.value_dim, partial + 2 * rows + row * memory.value_dim);
    }
}

// One of these joins the others.
inline void merge_partial(const ItemMemory& memory, const float* partial) {
    const float *maximum = partial, *total = maximum + memory.rows, *output = total + memory.rows;
    for (int64_t row = 0; row < memory.rows; ++row) {
        merge_row(memory, row, maximum[row], total[row], output + row * memory.value_dim);
    }
}

template <class T>
inline void write_row(const ItemMemory& memory, int64_t row, T* out) {
    const float* output = memory.merged_output + row * memory.value_dim;
    const float total = memory.merged_total[row];
    for (int64_t i = 0; i < memory.args.values.dim; ++i) narrow(output[i] / total, out + i);
}

inline void write_output(const ItemMemory& memory) {
    const AttentionArgs& args = memory.args;
    for (int64_t row = 0; row < memory.rows; ++row) {
        const int64_t at = (memory.token_of(row) * args.heads + memory.head_of(row)) * args.values.dim;
        if (args.query_dtype == DType::kFloat32) {
            write_row(memory, row, static_cast<float*>(args.out) + at);
        } else {
            write_row(memory, row, static_cast<Bfloat16*>(args.out) + at);
        }
    }
}

}  // namespace
}  // namespace amalgam
