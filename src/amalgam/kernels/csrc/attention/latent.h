// What happens between the projections of multi-head latent attention and its projection back.
#pragma once

#include <memory>
#include <vector>

#include "attention/attention.h"
#include "attention/cached.h"
#include "product/linear.h"

namespace amalgam {

// The heads of one layer. A cached row is the normed latent vector and behind it the rotated key.
struct LatentHeads {
    std::vector<std::shared_ptr<PackedMatrix>> to_keys;    // by head [latent, nope]: multiplies the query
    std::vector<std::shared_ptr<PackedMatrix>> to_values;  // by head [value, latent]: multiplies what is attended to
    NormWeight norm;                                       // of the latent vector; null: it is normed already
    float eps, scale;
    int64_t nope, rope, latent, value;  // dimensions
    bool is_interleaved;                // rotary pairs are neighbours
};

struct LatentAttentionArgs {
    const LatentHeads* heads;
    const void* query;       // [tokens, heads, nope + rope], dense
    const void* compressed;  // [tokens, latent + rope], dense
    void* out;               // [tokens, heads, value], dense
    DType dtype;             // of all activations
    const float* cos;        // [positions, rope / 2], or null where rope is 0
    const float* sin;
    const int64_t* positions;  // [tokens]
    CacheView keys;            // one head of latent + rope, dense
    const int64_t* slot_ids;   // [tokens]
    int64_t num_slots;
};

// Throws std::out_of_range, before anything is written, at a slot that is not in the cache.
void latent_attention(const Execution& execution, const AttentionKernels& attention, const AttentionPlan& plan,
                      const LatentAttentionArgs& args);

}  // namespace amalgam
