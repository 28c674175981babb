// Blocks with a state per sequence that lies in slots, behind their projections: a causal convolution, the delta rule
// (Yang et al. 2024, arXiv:2412.06464) and Mamba-2's state space (Dao & Gu 2024, arXiv:2405.21060). And the gate of
// gated attention.
//
// Order of arithmetic. A token's state is computed from that of the token before it, element by element in float32, so
// that a row's bits depend neither on the rows computed with it nor on how the work was shared out.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "product/matrix.h"

namespace amalgam {

// Where a sequence's states are.
struct StateSlots {
    int64_t source;  // before the first token; -1: all zeros
    int64_t target;  // after the last token; may be the source
    // (after how many tokens, the slot that gets the state there), in order.
    std::vector<std::pair<int64_t, int64_t>> saves;
};

struct StateSequence {
    int64_t first_token, num_tokens;  // rows; at least one
    StateSlots slots;
};

// Rows of activations, float32 or bfloat16.
struct ActivationRows {
    void* data;
    DType dtype;
    int64_t stride;  // elements from row to row
};

// out[t] = behind[t] * silu(bias + sum over i of weight[i] * (before * x)[t - taps + 1 + i]); rows before the
// sequence's are in its state.
struct ConvolveArgs {
    ActivationRows x, out;          // [tokens, channels], apart from each other
    ActivationRows before, behind;  // likewise; without data: no factor
    const float* weight;            // [taps, channels]
    const float* bias;              // [channels], or null
    bool activates;                 // whether there is a silu
    int64_t taps, channels;
    float* states;  // [slots, taps - 1, channels], the last rows that were seen, the oldest first
};

// How a step of Mamba-2 comes about and what goes past the state.
struct StateSpace {
    float least, most;  // of a step
    const float* skip;  // [value_heads]
};

// The delta rule. Per value head, with S its state, and q and k of length 1 / sqrt(key_dim) and 1:
//   S = exp(-exp(log_rate) softplus(decay + decay_bias)) S;  S += k (sigmoid(strength) (value - S^T k))^T;  out = S^T q
// With a `bound` the factor of S is exp(bound sigmoid(exp(log_rate) (decay + decay_bias))). Or Mamba-2's state space,
// with q and k as they are, and step = softplus(decay + decay_bias) within bounds:
//   S = exp(-exp(log_rate) step) S;  S += k (step value)^T;  out = S^T q + skip value
struct DeltaArgs {
    ActivationRows query, key;  // [tokens, key_heads, key_dim]
    ActivationRows value, out;  // [tokens, value_heads, value_dim], apart from each other
    ActivationRows decay;       // [tokens, value_heads], or [tokens, value_heads, key_dim]: a factor for each row of S
    ActivationRows strength;    // [tokens, value_heads]
    const float* log_rate;      // [value_heads]
    const float* decay_bias;    // as wide as decay
    int64_t key_heads, value_heads, key_dim, value_dim;
    bool has_row_decays;
    float bound;                    // 0: none
    const StateSpace* state_space;  // or null
    float* states;                  // [slots, value_heads, key_dim, value_dim]
};

// x[t, i] *= sigmoid(gate[t, i / share]), in place.
struct GateArgs {
    ActivationRows x, gate;
    int64_t width, share;
};

// Channels and rows that a convolution works on at a time.
constexpr int64_t kConvolvedChannels = 128, kConvolvedRows = 16;

// scratch is at a multiple of 64 bytes.
struct GatedKernels {
    const char* isa;
    // scratch: kConvolvedChannels * (taps - 1 + kConvolvedRows) floats.
    void (*convolve)(const ConvolveArgs&, const StateSequence&, int64_t first_channel, int64_t end_channel,
                     float* scratch);
    // Some columns of one value head. scratch: `delta_scratch` floats.
    void (*delta_rule)(const DeltaArgs&, const StateSequence&, int64_t head, int64_t first_column, int64_t end_column,
                       float* scratch);
    int64_t (*delta_scratch)(const DeltaArgs&);
    void (*gate)(const GateArgs&, int64_t first_row, int64_t end_row);
};

void convolve(const GatedKernels& kernels, const std::vector<StateSequence>& sequences, const ConvolveArgs& args,
              int num_threads);

void delta_rule(const GatedKernels& kernels, const std::vector<StateSequence>& sequences, const DeltaArgs& args,
                int num_threads);

void gate(const GatedKernels& kernels, const GateArgs& args, int64_t rows, int num_threads);

}  // namespace amalgam
