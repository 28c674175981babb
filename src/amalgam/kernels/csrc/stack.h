// Decoder layers one after the other in one call: between two products nothing but other kernels runs, where Python
// would fetch its own code and data back into caches that the weights have filled.
#pragma once

#include <memory>
#include <vector>

#include "cached_attention.h"
#include "linear.h"

namespace amalgam {

struct Weight {
    std::shared_ptr<PackedMatrix> matrix;
    Bias bias;
};

struct NormWeight {
    const void* data;  // null: no norm
    DType dtype;
};

// One layer: attention, sum and norm, a dense gated MLP or a mixture of experts, sum and the norm that comes next.
// Whoever adds a layer keeps alive what it points to.
struct StackLayer {
    Weight query, key, value, out;
    NormWeight query_norm, key_norm, mlp_norm, next_norm;
    float head_norm_eps, norm_eps;
    int64_t heads, kv_heads, head_dim;
    float scale;
    int64_t window;         // 0: none
    const float* sinks;     // or null
    int64_t rope;           // which pair of tables; -1: none
    Weight gate, up, down;  // dense; without matrices: a mixture
    std::shared_ptr<PackedMatrix> router;
    int64_t num_active;
    bool normalises;
    float sum_eps;
    const std::vector<ExpertWeights>* experts;
    Gating gating;
};

struct StackArgs {
    void* x;       // [tokens, hidden], the residual stream; replaced by the stream after the last layer
    void* normed;  // [tokens, hidden], its norm; likewise
    DType dtype;   // of both, and of the caches
    int64_t hidden;
    const int64_t* positions;            // [tokens], rows of cos and sin
    int64_t num_positions;               // rows that all of them have
    std::vector<const float*> cos, sin;  // by rope: [positions, half]
    std::vector<int64_t> half;
    std::vector<void*> keys, values;  // by layer: [slots, kv heads, head dim]
    const int64_t* slot_ids;
    int64_t num_slots;
    int64_t* expert_ids;  // [mixtures, tokens, k]; all mixtures have one k
    float* gate_weights;  // likewise
};

// Throws std::out_of_range at a position or a slot that there is not.
void run_stack(const Kernels& kernels, const AttentionKernels& attention, const AttentionPlan& plan,
               const std::vector<StackLayer>& layers, const StackArgs& args, int num_threads);

}  // namespace amalgam
