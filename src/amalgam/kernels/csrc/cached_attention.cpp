#include "cached_attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pool.h"

namespace amalgam {
namespace {

constexpr int64_t kElementsPerItem = 1 << 14;

using Bytes = std::vector<char>;

char* room(Bytes& buffer, int64_t bytes) {
    if (buffer.size() < static_cast<size_t>(bytes)) buffer.resize(static_cast<size_t>(bytes));
    return buffer.data();
}

// One token's heads, normed and rotated, from `x` to `out`, which do not overlap.
void place_heads(const Kernels& kernels, const CachedAttentionArgs& args, int64_t token, int64_t heads, const void* x,
                 const void* norm, void* out) {
    static thread_local Bytes buffer;
    const int64_t dim = args.attention.keys.dim, size = heads * dim;
    const int64_t bytes = size * (args.dtype == DType::kFloat32 ? 4 : 2);
    if (norm != nullptr) {
        void* normed = args.cos != nullptr ? room(buffer, bytes) : out;
        kernels.rms_norm({x, nullptr, nullptr, norm, normed, dim, args.eps, args.dtype, args.norm_dtype}, 0, heads);
        x = normed;
    }
    if (args.cos != nullptr) {
        const float *cos = args.cos + token * args.half, *sin = args.sin + token * args.half;
        kernels.rotate({x, cos, sin, out, size, heads, dim, args.half, args.dtype}, 0, 1);
    } else if (x != out) {
        std::memcpy(out, x, static_cast<size_t>(bytes));
    }
}

}  // namespace

void cached_attention(const Kernels& kernels, const AttentionKernels& attention, const AttentionPlan& plan,
                      const CachedAttentionArgs& args, int num_threads) {
    static thread_local Bytes placed;
    const int64_t tokens = plan.num_tokens(), item_bytes = args.dtype == DType::kFloat32 ? 4 : 2;
    check_slots(args.slot_ids, tokens, args.num_slots);
    AttentionArgs attend = args.attention;
    const int64_t heads = attend.heads, kv_heads = attend.kv_heads;
    const int64_t query_size = heads * attend.keys.dim, key_size = kv_heads * attend.keys.dim;
    const int64_t value_size = kv_heads * attend.values.dim;
    char* queries = room(placed, tokens * query_size * item_bytes);
    const auto at = [&](const void* data, int64_t elements) {
        return static_cast<char*>(const_cast<void*>(data)) + elements * item_bytes;
    };
    const int64_t tokens_per_item = std::max<int64_t>(1, kElementsPerItem / (query_size + key_size));
    parallel_ranges(tokens, tokens_per_item, num_threads, [&](int64_t first, int64_t end) {
        for (int64_t token = first; token < end; ++token) {
            const int64_t slot = args.slot_ids[token];
            place_heads(kernels, args, token, heads, at(args.query, token * args.query_stride), args.query_norm,
                        queries + token * query_size * item_bytes);
            place_heads(kernels, args, token, kv_heads, at(args.key, token * args.key_stride), args.key_norm,
                        at(args.keys, slot * key_size));
            std::memcpy(at(args.values, slot * value_size), at(args.value, token * args.value_stride),
                        static_cast<size_t>(value_size * item_bytes));
        }
    });
    attend.query = queries;
    attend.query_dtype = args.dtype;
    attend.query_token_stride = query_size;
    attend.query_head_stride = attend.keys.dim;
    paged_attention(attention, plan, attend, num_threads);
}

}  // namespace amalgam
