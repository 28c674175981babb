#include "attention/cached.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa/float_types.h"
#include "runtime/pool.h"

namespace amalgam {
namespace {

constexpr int64_t kElementsPerItem = 1 << 14;

using Bytes = std::vector<char>;

char* room(Bytes& buffer, int64_t bytes) {
    if (buffer.size() < static_cast<size_t>(bytes)) buffer.resize(static_cast<size_t>(bytes));
    return buffer.data();
}

// Of each head the first 2 * half dimensions, pairs of neighbours, as halves; the others as they are.
template <class T>
void part_pairs(const void* from, int64_t heads, int64_t dim, int64_t half, void* to) {
    const T* x = static_cast<const T*>(from);
    T* out = static_cast<T*>(to);
    for (int64_t head = 0; head < heads; ++head, x += dim, out += dim) {
        for (int64_t i = 0; i < half; ++i) {
            out[i] = x[2 * i];
            out[half + i] = x[2 * i + 1];
        }
        std::copy(x + 2 * half, x + dim, out + 2 * half);
    }
}

// Some of a token's heads, rotated, from `x` to `out`, which do not overlap.
void rotate_heads(const Kernels& kernels, const CachedAttentionArgs& args, int64_t token, int64_t heads, const void* x,
                  void* out) {
    static thread_local Bytes halves;
    const int64_t dim = args.attention.keys.dim, size = heads * dim;
    if (args.is_interleaved) {
        void* apart = room(halves, size * dtype_bytes(args.dtype));
        if (args.dtype == DType::kFloat32) {
            part_pairs<float>(x, heads, dim, args.half, apart);
        } else {
            part_pairs<Bfloat16>(x, heads, dim, args.half, apart);
        }
        x = apart;
    }
    const int64_t row = args.positions != nullptr ? args.positions[token] : token;
    const float *cos = args.cos + row * args.half, *sin = args.sin + row * args.half;
    kernels.rotate({x, cos, sin, out, size, heads, dim, args.half, args.dtype}, 0, 1);
}

// Some of a token's heads, normed and rotated, from `x` to `out`, which do not overlap.
void place_heads(const Kernels& kernels, const CachedAttentionArgs& args, int64_t token, int64_t heads, const void* x,
                 const void* norm, void* out) {
    static thread_local Bytes buffer;
    const int64_t dim = args.attention.keys.dim, bytes = heads * dim * dtype_bytes(args.dtype);
    const bool has_norm = norm != nullptr, has_rope = args.cos != nullptr;
    void* between = has_norm && has_rope ? room(buffer, bytes) : out;
    const auto normalize = [&](const void* from, void* to) {
        kernels.rms_norm(
            {from, nullptr, nullptr, norm, to, dim, args.eps, args.dtype, args.norm_dtype, args.rounds_last}, 0, heads);
    };
    if (!has_norm && !has_rope) {
        std::memcpy(out, x, static_cast<size_t>(bytes));
    } else if (args.norms_last) {
        if (has_rope) rotate_heads(kernels, args, token, heads, x, between);
        if (has_norm) normalize(has_rope ? between : x, out);
    } else {
        if (has_norm) normalize(x, between);
        if (has_rope) rotate_heads(kernels, args, token, heads, has_norm ? between : x, out);
    }
}

// A token's key of one head, normed and rotated, into the cache.
void place_key(const Kernels& kernels, const CachedAttentionArgs& args, int64_t token, int64_t slot, int64_t head) {
    static thread_local Bytes buffer;
    const CacheView& keys = args.attention.keys;
    const void* key = advance(args.key, args.dtype, token * args.key_stride + head * keys.dim);
    const bool is_direct = keys.dtype == args.dtype;
    void* to = is_direct ? advance(keys.data, keys.dtype, slot * keys.slot_stride + head * keys.head_stride)
                         : room(buffer, keys.dim * dtype_bytes(args.dtype));
    place_heads(kernels, args, token, 1, key, args.key_norm, to);
    if (!is_direct) store_row(to, args.dtype, keys, args.attention.kv_heads, slot, head);
}

}  // namespace

void cached_attention(const Kernels& kernels, const AttentionKernels& attention, const AttentionPlan& plan,
                      const CachedAttentionArgs& args, int num_threads) {
    static thread_local Bytes placed;
    const int64_t tokens = plan.num_tokens(), item_bytes = dtype_bytes(args.dtype);
    check_slots(args.slot_ids, tokens, args.num_slots);
    AttentionArgs attend = args.attention;
    const int64_t heads = attend.heads, kv_heads = attend.kv_heads;
    const int64_t query_size = heads * attend.keys.dim;
    char* queries = room(placed, tokens * query_size * item_bytes);
    const auto at = [&](const void* data, int64_t elements) {
        return static_cast<char*>(const_cast<void*>(data)) + elements * item_bytes;
    };
    // A unit is a token's KV head and the query heads that share it.
    const int64_t units = tokens * kv_heads, shared = heads / kv_heads;
    const int64_t dim = attend.keys.dim, value_dim = attend.values.dim;
    const int64_t few = (units + num_threads - 1) / std::max(1, num_threads),
                  many = kElementsPerItem / ((shared + 2) * dim);
    parallel_ranges(units, std::max<int64_t>(1, std::min(few, many)), num_threads, [&](int64_t first, int64_t end) {
        for (int64_t unit = first; unit < end; ++unit) {
            const int64_t token = unit / kv_heads, head = unit % kv_heads, slot = args.slot_ids[token];
            const int64_t query = head * shared * dim;
            place_heads(kernels, args, token, shared, at(args.query, token * args.query_stride + query),
                        args.query_norm, queries + (token * query_size + query) * item_bytes);
            place_key(kernels, args, token, slot, head);
            store_row(at(args.value, token * args.value_stride + head * value_dim), args.dtype, attend.values, kv_heads,
                      slot, head);
        }
    });
    attend.query = queries;
    attend.query_dtype = args.dtype;
    attend.query_token_stride = query_size;
    attend.query_head_stride = attend.keys.dim;
    paged_attention(attention, plan, attend, num_threads);
}

void write_keys(const Kernels& kernels, const CachedAttentionArgs& args, int64_t tokens, int num_threads) {
    check_slots(args.slot_ids, tokens, args.num_slots);
    const int64_t step = std::max<int64_t>(1, kElementsPerItem / args.attention.keys.dim);
    parallel_ranges(tokens, step, num_threads, [&](int64_t first, int64_t end) {
        for (int64_t token = first; token < end; ++token) place_key(kernels, args, token, args.slot_ids[token], 0);
    });
}

}  // namespace amalgam
