#include "attention/latent.h"

#include <algorithm>
#include <cstring>

#include "isa/float_types.h"
#include "runtime/pool.h"

namespace amalgam {
namespace {

constexpr int64_t kElementsPerItem = 1 << 14;

// Norm, rotations and the cache's rows of some tokens.
class Placing {
 public:
    Placing(const Kernels& kernels, const LatentAttentionArgs& args, char* queries)
        : kernels_(kernels),
          args_(args),
          heads_(*args.heads),
          queries_(queries),
          item_(dtype_bytes(args.dtype)),
          cached_((heads_.latent + heads_.rope) * item_) {}

    void operator()(int64_t token) const {
        const int64_t num_heads = static_cast<int64_t>(heads_.to_keys.size());
        const char* compressed = static_cast<const char*>(args_.compressed) + token * cached_;
        static thread_local std::vector<char> placing;
        const bool is_direct = args_.keys.dtype == args_.dtype;
        if (!is_direct) placing.resize(static_cast<size_t>(cached_));
        char* row = is_direct ? static_cast<char*>(args_.keys.data) + args_.slot_ids[token] * cached_ : placing.data();
        if (heads_.norm.data != nullptr) {
            kernels_.rms_norm({compressed, nullptr, nullptr, heads_.norm.data, row, heads_.latent, heads_.eps,
                               args_.dtype, heads_.norm.dtype},
                              0, 1);
        } else {
            std::memcpy(row, compressed, static_cast<size_t>(heads_.latent * item_));
        }
        rotate(token, compressed + heads_.latent * item_, row + heads_.latent * item_);
        if (!is_direct) store_row(row, args_.dtype, args_.keys, 1, args_.slot_ids[token], 0);
        const int64_t head_bytes = (heads_.nope + heads_.rope) * item_;
        const char* query = static_cast<const char*>(args_.query) + token * num_heads * head_bytes;
        char* placed = queries_ + token * num_heads * cached_;
        for (int64_t head = 0; head < num_heads; ++head) {
            rotate(token, query + head * head_bytes + heads_.nope * item_,
                   placed + head * cached_ + heads_.latent * item_);
        }
    }

 private:
    void rotate(int64_t token, const char* x, char* out) const {
        if (heads_.rope == 0) return;
        static thread_local std::vector<char> halves;
        if (heads_.is_interleaved) {
            halves.resize(static_cast<size_t>(heads_.rope * item_));
            for (int64_t i = 0; i < heads_.rope; ++i) {
                const int64_t to = (i % 2) * (heads_.rope / 2) + i / 2;
                std::memcpy(halves.data() + to * item_, x + i * item_, static_cast<size_t>(item_));
            }
            x = halves.data();
        }
        const int64_t half = heads_.rope / 2, at = args_.positions[token] * half;
        kernels_.rotate({x, args_.cos + at, args_.sin + at, out, heads_.rope, 1, heads_.rope, half, args_.dtype}, 0, 1);
    }

    const Kernels& kernels_;
    const LatentAttentionArgs& args_;
    const LatentHeads& heads_;
    char* queries_;
    int64_t item_, cached_;  // bytes of an element and of a row that is cached, as activations have it
};

// One product per head: x[t, head] by the head's matrix to out[t, head].
void multiply_heads(const Execution& execution, const std::vector<std::shared_ptr<PackedMatrix>>& matrices,
                    const void* x, int64_t x_head, void* out, int64_t out_head, DType dtype, int64_t tokens) {
    const int64_t count = static_cast<int64_t>(matrices.size());
    std::vector<HeadProduct> products;
    for (int64_t head = 0; head < count; ++head) {
        products.push_back({&matrices[static_cast<size_t>(head)]->matrix(), advance(x, dtype, head * x_head),
                            advance(out, dtype, head * out_head)});
    }
    linear_by_head(execution, products, {dtype, tokens, count * x_head, count * out_head});
}

}  // namespace

void latent_attention(const Execution& execution, const AttentionKernels& attention, const AttentionPlan& plan,
                      const LatentAttentionArgs& args) {
    static thread_local std::vector<char> buffer;
    const LatentHeads& heads = *args.heads;
    const int64_t tokens = plan.num_tokens(), num_heads = static_cast<int64_t>(heads.to_keys.size());
    const int64_t item = dtype_bytes(args.dtype), cached = heads.latent + heads.rope;
    check_slots(args.slot_ids, tokens, args.num_slots);
    const auto bytes = static_cast<size_t>(tokens * num_heads * (cached + heads.latent) * item);
    if (buffer.size() < bytes) buffer.resize(bytes);
    char* queries = buffer.data();
    char* attended = queries + tokens * num_heads * cached * item;

    const Placing place(*execution.kernels, args, queries);
    const int64_t step = std::max<int64_t>(1, kElementsPerItem / (num_heads * heads.rope + cached));
    parallel_ranges(tokens, step, execution.num_threads, [&](int64_t first, int64_t end) {
        for (int64_t token = first; token < end; ++token) place(token);
    });
    multiply_heads(execution, heads.to_keys, args.query, heads.nope + heads.rope, queries, cached, args.dtype, tokens);

    AttentionArgs attend{};
    attend.query = queries;
    attend.query_dtype = args.dtype;
    attend.query_token_stride = num_heads * cached;
    attend.query_head_stride = cached;
    attend.keys = attend.values = args.keys;
    attend.values.dim = heads.latent;
    attend.out = attended;
    attend.heads = num_heads;
    attend.kv_heads = 1;
    attend.scale = heads.scale;
    paged_attention(attention, plan, attend, execution.num_threads);
    multiply_heads(execution, heads.to_values, attended, heads.latent, args.out, heads.value, args.dtype, tokens);
}

}  // namespace amalgam
