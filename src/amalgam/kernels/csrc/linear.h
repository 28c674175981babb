// The drivers: cut one operator's work into items, make operands, run the items on the pool.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "packing.h"

namespace amalgam {

// With which kernels a call runs, and on how many threads.
struct Execution {
    const Kernels* kernels;
    int num_threads;
};

struct LinearArgs {
    const Matrix* weight;
    const void* x;  // [rows, columns], dense
    DType x_dtype;
    int64_t rows;
    Bias bias;
    void* out;  // [rows, weight rows], of the type of x
};

void linear(const Execution& execution, const LinearArgs& args);

struct ExpertWeights {
    std::shared_ptr<PackedMatrix> gate, up, down;
    Bias gate_bias, up_bias, down_bias;
};

struct MoeArgs {
    const std::vector<ExpertWeights>* experts;
    const void* x;  // [tokens, hidden], dense
    DType x_dtype;
    int64_t tokens;
    const int64_t* expert_ids;  // [tokens, num_active]
    const float* gate_weights;  // [tokens, num_active]
    int64_t num_active;
    Gating gating;
    void* out;  // [tokens, hidden], of the type of x
};

// Throws std::out_of_range at an expert id that is none.
void moe(const Execution& execution, const MoeArgs& args);

}  // namespace amalgam
