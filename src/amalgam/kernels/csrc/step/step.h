// A step in one call, from token ids to logits: the instructions of amalgam/kernels/program/. Between two products
// nothing but other kernels runs, where Python would fetch its own code and data back into caches that the weights have
// filled.
#pragma once

#include <memory>
#include <optional>
#include <variant>
#include <vector>

#include "attention/cached.h"
#include "attention/latent.h"
#include "gated/gated.h"
#include "step/routing.h"

namespace amalgam {

// Columns of a buffer of activations, [tokens, width] with `stride` elements from token to token.
struct Columns {
    int64_t buffer, stride, start, width;
};

struct Weight {
    std::shared_ptr<PackedMatrix> matrix;
    Bias bias;
};

// Rows to look up by token id or by position: a matrix in panels, or the rows as they are, [num_rows, width].
struct Embed {
    std::shared_ptr<PackedMatrix> matrix;
    const void* rows;
    DType dtype;
    int64_t num_rows;
    Columns out;
    bool by_position, adds;
};

// RMSNorm, with a bias LayerNorm; first x += delta if its width is not 0.
struct Normalize {
    Columns x, delta, out;
    NormWeight weight;
    const void* bias;  // of the weight's type, or null
    int64_t size;      // of the weight
    float eps;
    bool rounds_last;
};

struct Project {
    Columns x;
    std::vector<Weight> weights;
    std::vector<Columns> outs;
    bool widens;
};

struct Attend {
    Columns query, key, value, out;
    int64_t layer, heads, kv_heads, head_dim;
    NormWeight query_norm, key_norm;
    float head_norm_eps, scale;
    int64_t window;      // 0: none
    const float* sinks;  // or null
    int64_t rope;        // which pair of tables; -1: none
    float softcap;       // 0: none
    bool rounds_last;    // of the head norms
    bool is_interleaved;
    bool norms_last;  // after the rotation
    int64_t chunk;    // 0: none
};

struct AttendLatent {
    Columns query, compressed, out;
    int64_t layer, rope;  // rope -1: none
    bool is_indexed;      // over the positions of StepArgs::chosen, if there are
    LatentHeads heads;
};

// The key that an indexer finds a token by, rotated, into the layer's cache of them.
struct KeepIndexKey {
    Columns key;
    int64_t layer, rope;  // rope -1: none
    bool is_interleaved;
};

struct Route {
    Columns x;
    Weight weight;
    ExpertChoice choice;
    int64_t index;  // among the routes of the program
};

struct Mix {
    Columns x, out;
    const std::vector<ExpertWeights>* experts;
    Gating gating;
    int64_t route;
    bool weighs;  // whether the results are multiplied by the gate weights
};

// out = x times the gate weight of the token's only expert.
struct WeighInput {
    Columns x, out;
    int64_t route;
};

struct SwiGlu {
    Columns gate, up, out;  // gate and up may be columns of wider rows
    Gating gating;
};

struct Elementwise {
    Columns x, y;  // y of kAdd only
    ElementwiseKind kind;
    float number;
};

// x *= 1 + beta * ln(1 + floor((position + offset) / length))
struct ScaleByPosition {
    Columns x;
    double beta, length, offset;
};

// x *= slopes[head] * ln(position + 1) + biases[head]
struct ScaleHeads {
    Columns x;
    int64_t heads;
    const float *slopes, *biases;
};

struct ScaleBySigmoid {
    Columns x, gate;
};

// x *= sigmoid(gate), one factor per element, or for each equal part of a row.
struct Gate {
    Columns x, gate;
};

// Columns in equal groups become one part of each group after the other: all queries, all keys, ...
struct Split {
    Columns x;
    int64_t groups;
    std::vector<Columns> outs;
};

struct Convolve {
    Columns x, out;
    std::optional<Columns> before, behind;
    int64_t layer, taps;
    const float* weight;  // [taps, channels]
    const float* bias;    // [channels], or null
    bool activates;
};

struct DeltaRule {
    Columns query, key, value, decay, strength, out;
    int64_t layer, key_heads, value_heads;
    const float *log_rate, *decay_bias;
    float bound;                            // 0: none
    std::optional<StateSpace> state_space;  // which has no strengths

    int64_t key_dim() const { return key.width / key_heads; }
    int64_t value_dim() const { return value.width / value_heads; }
};

struct Head {
    Columns x;
    Weight weight;
    float scale, softcap;  // 1 and 0: the logits stay as they are
};

using Instruction =
    std::variant<Embed, Normalize, Project, Attend, AttendLatent, KeepIndexKey, Route, Mix, SwiGlu, Elementwise,
                 ScaleByPosition, ScaleHeads, ScaleBySigmoid, WeighInput, Gate, Split, Convolve, DeltaRule, Head>;

// Whoever adds an instruction keeps alive what it points to.
struct Program {
    std::vector<bool> is_wide;  // by buffer: float32 whatever the activations are
    std::vector<Instruction> instructions;
    int64_t num_active = 0;  // experts of a token
};

// A layer's states of sequences, by slot; null: it has none.
struct StateView {
    float *convolution, *recurrent;
};

// What steps find in the same place: caches and states by layer, dense, and the rotary tables by rope.
struct StepMemory {
    std::vector<CacheView> keys, values;
    std::vector<CacheView> index_keys;  // of the layers that have an indexer; the others' have no data
    int64_t num_slots, block_size;
    std::vector<const float*> cos, sin;  // [positions, half]
    std::vector<int64_t> half;
    int64_t num_positions;  // rows that all tables have
    std::vector<StateView> states;
    int64_t num_states;  // slots
};

// One sequence's share of a step.
struct StepSequence {
    std::vector<int64_t> token_ids;
    int64_t first_position;
    std::vector<int64_t> block_ids;  // where its keys and values lie, from position 0 on
    int64_t num_logits;              // of its last tokens
    std::optional<StateSlots> state;
};

struct StepArgs {
    std::vector<StepSequence> sequences;
    DType dtype;                 // of activations
    std::vector<char*> buffers;  // [tokens, the widest stride] each
    int64_t* expert_ids;         // [routes, tokens, k]
    float* gate_weights;         // likewise
    float* logits;               // of the wanted rows, [num_logits, vocabulary]
    int64_t num_logits;
    const AttentionPlan* chosen = nullptr;  // which positions the tokens see where an indexer chooses; null: all
};

// Runs instructions [first, end). Throws std::out_of_range at a token, a position or a slot that there is not, and
// std::invalid_argument where a sequence has too few blocks, no state that an instruction needs, states saved in no
// order, positions are chosen for other tokens, or `num_logits` is wrong. Nothing is written then.
void run_step(const Kernels& kernels, const AttentionKernels& attention, const GatedKernels& gated,
              const Program& program, const StepMemory& memory, const StepArgs& step, size_t first, size_t end,
              int num_threads);

}  // namespace amalgam
