// The drivers: cut one operator's work into items, make operands, run the items on the pool.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "product/kernels.h"
#include "product/packing.h"

namespace amalgam {

// With which kernels a call runs, and on how many threads.
struct Execution {
    const Kernels* kernels;
    int num_threads;
};

// One weight that is multiplied, and where the product goes.
struct Projection {
    const Matrix* weight;
    Bias bias;
    void* out;  // [rows, weight rows]
};

struct LinearArgs {
    const void* x;  // [rows, columns], dense
    DType x_dtype;
    int64_t rows;
    DType out_dtype;  // of all products
};

// Products of the same rows with several weights of as many columns; their activations are made once where they are
// the same, and the threads share all panels.
void linear(const Execution& execution, const LinearArgs& args, const std::vector<Projection>& projections);

// A weight that multiplies rows of its own.
struct HeadProduct {
    const Matrix* weight;
    const void* x;  // [rows, columns], `x_stride` elements from row to row
    void* out;      // [rows, weight rows], `out_stride` elements from row to row
};

struct HeadRows {
    DType dtype;  // of all rows and results
    int64_t rows, x_stride, out_stride;
};

// Products of different rows, as attention has one per head; the threads share all of them.
void linear_by_head(const Execution& execution, const std::vector<HeadProduct>& products, const HeadRows& rows);

// x as float32, dense; in memory that the calling thread keeps until its next call, or x itself.
const float* widened(const Execution& execution, const void* x, DType dtype, int64_t elements);

struct ExpertWeights {
    std::shared_ptr<PackedMatrix> gate, up, down;
    Bias gate_bias, up_bias, down_bias;
};

struct ExpertsArgs {
    const std::vector<ExpertWeights>* experts;
    const void* x;  // [tokens, hidden], dense
    DType x_dtype;
    int64_t tokens;
    const int64_t* expert_ids;  // [tokens, num_active]; -1: no choice
    int64_t num_active;
    Gating gating;
};

struct MoeArgs : ExpertsArgs {
    const float* gate_weights;  // [tokens, num_active]
    void* out;                  // [tokens, hidden], of the type of x
};

// A choice that is none adds nothing, whatever its gate weight. Throws std::out_of_range at another id that is none.
void moe(const Execution& execution, const MoeArgs& args);

// The two halves of it. First each expert's output for its tokens, [tokens, num_active, hidden]; where an id is -1, out
// is left alone. Throws std::out_of_range at another id that is none.
void expert_outputs(const Execution& execution, const ExpertsArgs& args, float* out);

// Then out[t] = sum over k of gate_weights[t, k] * outputs[t, k], in the order of k, but for those whose id is -1.
void weighted_sum(const Execution& execution, const float* outputs, const int64_t* expert_ids,
                  const float* gate_weights, int64_t tokens, int64_t num_active, int64_t hidden, void* out,
                  DType out_dtype);

}  // namespace amalgam
