// What happens between a layer's projections to queries, keys and values, and its projection back.
#pragma once

#include "attention/attention.h"
#include "product/kernels.h"

namespace amalgam {

// Norm of every query and key head (see RmsNormArgs), rotary embedding (see RotateArgs), keys and values into the
// cache, attention over it. is_interleaved: rotary pairs are neighbours; they leave as halves, queries and keys alike,
// which no score notices. norms_last: after the rotation. All activations are of one type; rows are dense.
struct CachedAttentionArgs {
    const void* query;  // [tokens, heads, dim]
    const void* key;    // [tokens, kv heads, dim]
    const void* value;  // [tokens, kv heads, value dim]
    DType dtype;
    int64_t query_stride, key_stride, value_stride;  // elements from token to token
    const void* query_norm;                          // [dim] or null: no norm
    const void* key_norm;
    DType norm_dtype;
    float eps;
    bool rounds_last, is_interleaved, norms_last;
    const float* cos;  // [tokens, half], or by position; null: no rotation
    const float* sin;
    const int64_t* positions;  // [tokens], rows of cos and sin; null: they are by token
    int64_t half;
    const int64_t* slot_ids;
    int64_t num_slots;
    AttentionArgs attention;  // everything but the query; the caches are dense
};

// Throws std::out_of_range, before anything is written, at a slot that is not in the cache.
void cached_attention(const Kernels& kernels, const AttentionKernels& attention, const AttentionPlan& plan,
                      const CachedAttentionArgs& args, int num_threads);

// Keys alone into a cache of one head, as above. Of `args`, what concerns queries and values is not looked at.
// Throws std::out_of_range, before anything is written, at a slot that is not in the cache.
void write_keys(const Kernels& kernels, const CachedAttentionArgs& args, int64_t tokens, int num_threads);

}  // namespace amalgam
