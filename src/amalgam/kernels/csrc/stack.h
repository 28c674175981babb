// A standard model's step in one call, from token ids to logits: between two products nothing but other kernels runs,
// where Python would fetch its own code and data back into caches that the weights have filled.
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

// Rows to look up: a matrix in panels, or the rows as they are.
struct Embedding {
    std::shared_ptr<PackedMatrix> matrix;
    const void* rows;  // [num_rows, hidden] where there is no matrix; null as well: steps bring their rows
    DType dtype;
    int64_t num_rows;
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

struct StackModel {
    int64_t hidden;
    Embedding embedding;
    NormWeight first_norm;
    float norm_eps;
    std::vector<StackLayer> layers;
    Weight head;  // without a matrix: a step gives what the last norm gives
};

// What steps find in the same place: the caches by layer, [slots, kv heads, head dim], and the rotary tables by rope.
struct StackMemory {
    std::vector<void*> keys, values;
    int64_t num_slots, block_size;
    std::vector<const float*> cos, sin;  // [positions, half]
    std::vector<int64_t> half;
    int64_t num_positions;  // rows that all tables have
};

// One sequence's share of a step.
struct StackSequence {
    std::vector<int64_t> token_ids;
    int64_t first_position;
    std::vector<int64_t> block_ids;  // where its keys and values lie, from position 0 on
    int64_t num_logits;              // of its last tokens
};

struct StackStep {
    std::vector<StackSequence> sequences;
    DType dtype;          // of activations and caches
    const void* x;        // [tokens, hidden]; null: looked up
    int64_t* expert_ids;  // [mixtures, tokens, k], where all mixtures have one k; null: nobody asks
    float* gate_weights;  // likewise
    void* out;            // of the wanted rows: float32 [num_logits, vocabulary], without a head [.., hidden] of dtype
    int64_t num_logits;
};

// Throws std::out_of_range at a token, a position or a slot that there is not, and std::invalid_argument where a
// sequence has too few blocks or `num_logits` is wrong. Nothing is written then.
void run_stack(const Kernels& kernels, const AttentionKernels& attention, const StackModel& model,
               const StackMemory& memory, const StackStep& step, int num_threads);

}  // namespace amalgam
